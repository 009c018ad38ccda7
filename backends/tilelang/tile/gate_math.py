"""The gates of a chunk and their sums.

    g = -exp(A_log) softplus(g_raw + dt_bias), beta = c sigmoid(beta_raw)    where fused
    G = cumsum(g) / ln 2 within the chunk

Past the end of the sequence g and beta are 0, so that G stays at its last value.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.definition import GATE_FLOOR

from .layout import BETA, LOG2_E, G

WEAK = 0.0625
"""Where beta is not larger, nothing is divided by it."""


def stored_R_scale(beta: Any) -> Any:
    """What backward's R is multiplied by before it goes through memory: beta, which makes it dv,
    unless that is too weak to be divided by again."""
    return T.if_then_else(beta > WEAK, beta, 1.0)


def remaining_beta(beta: Any) -> Any:
    """What is left of beta to multiply `kept` R by."""
    return T.if_then_else(beta > WEAK, 1.0, beta)


def log_decay(x: Any, y: Any, A_log: Any) -> Any:
    """-exp(A_log) softplus(x), given y = e^-|x|. softplus(x) is x + log(1 + y) or, below zero, e^x
    times log(1 + y) / y; that e^x goes into the other exponential, since one factor may overflow
    where the other vanishes."""
    below = T.if_then_else(y < 1e-4, 1 - y / 2, T.log(1 + y) / y)
    return -T.exp(A_log + T.min(x, 0.0)) * T.if_then_else(x > 0, x + T.log(1 + y), below)


def log_decay_slope(x: Any, y: Any, A_log: Any) -> Any:
    """Its derivative, -exp(A_log) sigmoid(x)."""
    return -T.exp(A_log + T.min(x, 0.0)) / (1 + y)


@T.macro
def load_gates(
    g: Any, beta: Any, A_log: Any, dt_bias: Any, batch: Any, head: Any, at: Any, live: Any,
    raw: Any, lane: Any, gate: bool, bias: bool,
) -> None:  # fmt: skip
    """raw = g and beta of the `live` tokens from `at`, two a lane of one warp; A_log, dt_bias."""
    for i in T.unroll(2):
        raw[i] = 0.0
        raw[2 + i] = 0.0
        if lane * 2 + i < live:
            raw[i] = T.cast(g[batch, at + lane * 2 + i, head], "float32")
            raw[2 + i] = T.cast(beta[batch, at + lane * 2 + i, head], "float32")
    if gate:
        raw[4] = A_log[head]
        if bias:
            raw[5] = dt_bias[head]


@T.macro
def sum_gates(
    raw: Any, live: Any, gates: Any, b: Any, lane: Any, gate: bool, bias: bool, sigmoid: bool,
    double: bool,
) -> None:  # fmt: skip
    """Rows G and BETA of gates[b], of what `load_gates` has loaded."""
    step = T.alloc_local((2,), "float32")
    written = T.alloc_local((2,), "float32")
    y = T.alloc_local((1,), "float32")
    for i in T.unroll(2):
        step[i] = raw[i]
        written[i] = raw[2 + i]
        if gate:
            if bias:
                step[i] += raw[5]
            y[0] = T.exp(-T.abs(step[i]))
            step[i] = log_decay(step[i], y[0], raw[4])
        if step[i] < GATE_FLOOR:  # so that sums keep their digits; NaN stays
            step[i] = GATE_FLOOR
        if sigmoid:
            written[i] = (2.0 if double else 1.0) / (1.0 + T.exp(-written[i]))
        if lane * 2 + i >= live:
            step[i] = 0.0
            written[i] = 0.0
    total = T.alloc_local((1,), "float32")
    other = T.alloc_local((1,), "float32")
    for i in T.unroll(2):
        step[i] *= LOG2_E
    total[0] = step[0] + step[1]
    for power in T.unroll(5):
        other[0] = T.shfl_up(total[0], 1 << power)
        if lane >= (1 << power):
            total[0] += other[0]
    other[0] = T.shfl_up(total[0], 1)
    if lane == 0:
        other[0] = 0.0
    gates[b, G, lane * 2] = other[0] + step[0]
    gates[b, G, lane * 2 + 1] = total[0]
    for i in T.unroll(2):
        gates[b, BETA, lane * 2 + i] = written[i]
