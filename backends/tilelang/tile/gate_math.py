"""The gates of a chunk and their running sum.

    g = -exp(A_log) softplus(g_raw + dt_bias)    if the gate is fused, else g = g_raw
    g = L sigmoid(exp(A_log) (g_raw + dt_bias))  if it has a lower bound L (decode alone)
    beta = c sigmoid(beta_raw)                   if the sigmoid is fused, else beta = beta_raw
    G = cumsum(g) / ln 2                         within the chunk

c is 1, or 2 with allow_neg_eigval. Past the end of the sequence g and beta are 0, so that G keeps
its last value.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.definition import GATE_FLOOR, LARGE

from .layout import BETA, LOG2_E, G

WEAK = 0.0625
"""Where beta is at most this, nothing is divided by beta."""
RAW_G, RAW_BETA, RAW_A_LOG, RAW_DT_BIAS = 0, 2, 4, 5
"""Where `load_gates` writes: two tokens' g, two tokens' beta, A_log and dt_bias, six numbers."""


def stored_R_scale(beta: Any) -> Any:
    """What R is multiplied by when backward stores it: beta, which makes it dv = beta R. 1 where
    beta <= 1/16, since R is recovered by division."""
    return T.if_then_else(beta > WEAK, beta, 1.0)


def remaining_beta(beta: Any) -> Any:
    """What makes dv of the stored R: beta where beta <= 1/16, else 1."""
    return T.if_then_else(beta > WEAK, 1.0, beta)


def log_decay(x: Any, y: Any, A_log: Any) -> Any:
    """-exp(A_log) softplus(x), given y = e^-|x|.

    softplus(x) is x + log(1 + y) if x > 0, else e^x log(1 + y) / y. There e^x is merged with
    e^A_log, since one of them may overflow where the other vanishes.
    """
    below = T.if_then_else(y < 1e-4, 1 - y / 2, T.log(1 + y) / y)
    return -T.exp(A_log + T.min(x, 0.0)) * T.if_then_else(x > 0, x + T.log(1 + y), below)


def fused_log_decay(x: Any, A_log: Any, lower_bound: float | None) -> Any:
    """The fused gate of x = g_raw + dt_bias, with a lower bound or without."""
    if lower_bound is None:
        return log_decay(x, T.exp(-T.abs(x)), A_log)
    # without infinities, since 0 inf is NaN; NaN stays
    x = T.if_then_else(x > LARGE, LARGE, T.if_then_else(x < -LARGE, -LARGE, x))
    return lower_bound / (1 + T.exp(-T.exp(T.min(A_log, 80.0)) * x))


def fused_strength(x: Any, double: bool) -> Any:
    """The fused sigmoid of beta_raw."""
    return (2.0 if double else 1.0) / (1.0 + T.exp(-x))


def always_slow(lower_bound: float | None) -> bool:
    """Whether gates with this bound never fall below 2^-60 over eight tokens."""
    return lower_bound is not None and lower_bound >= -5


def log_decay_slope(x: Any, y: Any, A_log: Any) -> Any:
    """The derivative of `log_decay` by x: -exp(A_log) sigmoid(x)."""
    return -T.exp(A_log + T.min(x, 0.0)) / (1 + y)


@T.macro
def load_gates(
    g: Any, beta: Any, A_log: Any, dt_bias: Any, batch: Any, head: Any, token: Any, live: Any,
    raw: Any, lane: Any, gate: bool, bias: bool,
) -> None:  # fmt: skip
    """Load g and beta of a chunk to registers, two tokens a lane of one warp, with A_log and
    dt_bias. token, live: the first token of the chunk, and how many belong to the sequence."""
    for i in T.unroll(2):
        raw[RAW_G + i] = 0.0
        raw[RAW_BETA + i] = 0.0
        if lane * 2 + i < live:
            raw[RAW_G + i] = T.cast(g[batch, token + lane * 2 + i, head], "float32")
            raw[RAW_BETA + i] = T.cast(beta[batch, token + lane * 2 + i, head], "float32")
    if gate:
        raw[RAW_A_LOG] = A_log[head]
        if bias:
            raw[RAW_DT_BIAS] = dt_bias[head]


@T.macro
def sum_gates(
    raw: Any, live: Any, gates: Any, b: Any, lane: Any, gate: bool, bias: bool, sigmoid: bool,
    double: bool,
) -> None:  # fmt: skip
    """Compute g and beta from what `load_gates` loaded, sum g over the chunk, and write the rows G
    and BETA of gates[b]."""
    g = T.alloc_local((2,), "float32")
    beta = T.alloc_local((2,), "float32")
    y = T.alloc_local((1,), "float32")
    for i in T.unroll(2):
        g[i] = raw[RAW_G + i]
        beta[i] = raw[RAW_BETA + i]
        if gate:
            if bias:
                g[i] += raw[RAW_DT_BIAS]
            y[0] = T.exp(-T.abs(g[i]))
            g[i] = log_decay(g[i], y[0], raw[RAW_A_LOG])
        if g[i] < GATE_FLOOR:  # so that sums keep their digits; NaN stays
            g[i] = GATE_FLOOR
        if sigmoid:
            beta[i] = fused_strength(beta[i], double)
        if lane * 2 + i >= live:
            g[i] = 0.0
            beta[i] = 0.0
    # an inclusive scan over the lanes, each with the sum of its two tokens
    total = T.alloc_local((1,), "float32")
    other = T.alloc_local((1,), "float32")
    for i in T.unroll(2):
        g[i] *= LOG2_E
    total[0] = g[0] + g[1]
    for power in T.unroll(5):
        other[0] = T.shfl_up(total[0], 1 << power)
        if lane >= (1 << power):
            total[0] += other[0]
    other[0] = T.shfl_up(total[0], 1)
    if lane == 0:
        other[0] = 0.0
    gates[b, G, lane * 2] = other[0] + g[0]
    gates[b, G, lane * 2 + 1] = total[0]
    for i in T.unroll(2):
        gates[b, BETA, lane * 2 + i] = beta[i]
