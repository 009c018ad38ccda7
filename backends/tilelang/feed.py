"""What the warps that load do for a chunk: the gates and their sums, and the norms of q and k.

    g = -exp(A_log) softplus(g_raw + dt_bias), beta = c sigmoid(beta_raw)    where fused
    G = cumsum(g) / ln 2 within the chunk
    r = 1 / sqrt(sum x^2 + 1e-6) of the rows of q and k

Past the end of the sequence g and beta are 0, so that G stays at its last value, and r is 1.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.definition import L2_EPS
from gdn.problem import CHUNK as C

from .couple import LOG2_E


def softplus(x: Any, y: Any) -> Any:
    """log(1 + e^x), given y = e^-|x|; exact for large and for very negative x."""
    return T.max(x, 0.0) + T.if_then_else(y < 1e-4, y - y * y / 2, T.log(1 + y))


@T.macro
def sum_gates(
    g: Any, beta: Any, A_log: Any, dt_bias: Any, batch: Any, head: Any, at: Any, live: Any,
    m: Any, s: Any, lane: Any, gate: bool, bias: bool, sigmoid: bool, double: bool,
) -> None:  # fmt: skip
    """m.G[s] and m.beta[s] of the `live` tokens from `at`, two a lane of one warp."""
    step = T.alloc_local((2,), "float32")
    written = T.alloc_local((2,), "float32")
    y = T.alloc_local((1,), "float32")
    for i in T.unroll(2):
        step[i] = 0.0
        written[i] = 0.0
        if lane * 2 + i < live:
            step[i] = T.cast(g[batch, at + lane * 2 + i, head], "float32")
            written[i] = T.cast(beta[batch, at + lane * 2 + i, head], "float32")
            if gate:
                if bias:
                    step[i] += dt_bias[head]
                y[0] = T.exp(-T.abs(step[i]))
                step[i] = -T.exp(A_log[head]) * softplus(step[i], y[0])
            if sigmoid:
                written[i] = (2.0 if double else 1.0) / (1.0 + T.exp(-written[i]))
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
    m.G[s, lane * 2] = other[0] + step[0]
    m.G[s, lane * 2 + 1] = total[0]
    for i in T.unroll(2):
        m.beta[s, lane * 2 + i] = written[i]


@T.macro
def norms(x: Any, r: Any, s: Any, live: Any, lane: Any) -> None:
    """r[s], by one warp: 1 / sqrt(sum x^2 + 1e-6) of the rows of x[s], shared memory of [C, K]."""
    part = T.alloc_local((8,), x.dtype)
    total = T.alloc_local((4,), "float32")
    for half in T.unroll(2):
        for i in T.unroll(4):
            total[i] = 0.0
        for eight in T.unroll(x.shape[2] // 8):
            for i in T.vectorized(8):
                part[i] = x[s, half * 32 + lane, eight * 8 + i]
            for i in T.unroll(8):
                total[i % 4] += T.cast(part[i], "float32") * T.cast(part[i], "float32")
        total[0] += total[1] + (total[2] + total[3]) + L2_EPS
        r[s, half * 32 + lane] = T.if_then_else(half * 32 + lane < live, T.rsqrt(total[0]), 1.0)
