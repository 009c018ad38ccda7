"""The gradients of beta and the gates in a chunk of one value head, from the other warpgroups'
sums; and that of v where beta is weak.

    dv = beta * R
    dbeta = rowsum(R * V) - rowsum(e^G * K * (R S^T)) - rowsum(N * (R U^T))
    dg_t = gradient times value, summed over the factors e^{G_i} with i >= t, e^{G_i - G_j} with
           i >= t > j, e^{gamma - G_j} with t > j, and e^gamma

The first term of dbeta is `reverse_scan.py`'s, which has R in float32. (It is also rowsum(R * U) /
beta, but with an error that U has from before its solution.) Then follow the gradients through the
sigmoid and the gate, with one partial sum a chunk for the gate's parameters.
"""

from typing import Any

import tilelang.language as T

from gdn.definition import GATE_FLOOR
from gdn.problem import CHUNK as C

from ..tile.gate_math import log_decay, log_decay_slope, remaining_beta, stored_R_scale
from ..tile.indexing import rolled_loop
from ..tile.layout import LOG2_E, ROWS
from .gradients_inter import KNOWN, READ, WRITTEN, sum_over


@T.macro
def mend_weak(
    m: Any, dv: Any, b: Any, batch: Any, at: Any, live: Any, head: Any, thread: Any
) -> None:
    """By 64 threads: dv of tokens whose beta is weak, over R in memory."""
    lanes = int(m.R.shape[2]) // 8
    some = T.alloc_local((8,), m.R.dtype)
    for step in rolled_loop(C * lanes // 64):
        i, j = step * (64 // lanes) + thread // lanes, thread % lanes * 8
        strength = remaining_beta(m.factors[b, 1, i])
        if i < live and strength != 1.0:
            for x in T.vectorized(8):
                some[x] = m.R[b, i, j + x]
            for x in T.unroll(8):
                some[x] = strength * some[x]
            for x in T.vectorized(8):
                dv[batch, at + i, head, j + x] = some[x]


@T.macro
def store_gates(
    m: Any, g: Any, A_log: Any, dt_bias: Any, dg: Any, dbeta: Any, dA_log: Any, ddt_bias: Any,
    b: Any, batch: Any, at: Any, live: Any, slot: Any, head: Any, scale: Any, lane: Any,
    gate: bool, bias: bool, sigmoid: bool, double: bool,
) -> None:  # fmt: skip
    """By one warp, two tokens a lane."""
    dG = T.alloc_local((2,), "float32")
    written = T.alloc_local((2,), "float32")
    d_beta = T.alloc_local((2,), "float32")
    run = T.alloc_local((2,), "float32")
    other = T.alloc_local((2,), "float32")
    carried = T.alloc_local((1,), "float32")
    for e in T.unroll(2):
        i = lane * 2 + e
        grown = T.exp2(m.factors[b, 0, i] * LOG2_E)
        beta, rk = m.factors[b, 1, i], m.factors[b, 3, i]
        strength = remaining_beta(beta)
        known = rk * grown * sum_over(m, b, KNOWN, i)
        dG[e] = scale * m.factors[b, 2, i] * grown * sum_over(m, b, READ, i) - strength * known
        dG[e] += m.rows[b, 1, i] - strength * m.rows[b, 0, i]
        for warp in T.unroll(4):
            dG[e] += m.columns[b, 0, warp, i] - m.columns[b, 1, warp, i]
        written[e] = (
            rk
            * sum_over(m, b, WRITTEN, i)
            * T.exp2((m.factors[b, 0, C - 1] - m.factors[b, 0, i]) * LOG2_E)
        )
        d_beta[e] = 0.0
        for block in T.unroll(int(m.R.shape[2]) // ROWS):
            d_beta[e] += m.factors[b, 4 + block, i]
        d_beta[e] -= (known + m.rows[b, 0, i]) / stored_R_scale(beta)
        if sigmoid:
            d_beta[e] *= beta * (1.0 - (0.5 if double else 1.0) * beta)
        if i < live:
            dbeta[batch, at + i, head] = d_beta[e]

    # dG of this token and later, written of earlier ones: without taking sums apart again
    run[0] = dG[0] + dG[1]
    run[1] = written[0] + written[1]
    for power in T.unroll(5):
        other[0] = T.shfl_down(run[0], 1 << power)
        other[1] = T.shfl_up(run[1], 1 << power)
        if lane + (1 << power) < 32:
            run[0] += other[0]
        if lane >= (1 << power):
            run[1] += other[1]
    other[0] = T.shfl_down(run[0], 1)
    other[1] = T.shfl_up(run[1], 1)
    if lane == 31:
        other[0] = 0.0
    if lane == 0:
        other[1] = 0.0
    carried[0] = 0.0
    for part in T.unroll(m.carried.shape[1]):
        carried[0] += m.carried[b, part]
    carried[0] *= T.exp2(m.factors[b, 0, C - 1] * LOG2_E)
    dG[1] += other[0]
    dG[0] += dG[1]
    dG[0] += other[1] + carried[0]
    dG[1] += other[1] + written[0] + carried[0]

    x = T.alloc_local((1,), "float32")
    y = T.alloc_local((1,), "float32")
    run[0] = 0.0
    run[1] = 0.0
    for e in T.unroll(2):
        i = lane * 2 + e
        if i < live:
            before = T.if_then_else(i > 0, m.factors[b, 0, T.max(i - 1, 0)], 0.0)
            if m.factors[b, 0, i] - before < GATE_FLOOR + 0.1:  # `sum_gates` has clamped
                dG[e] = 0.0
            elif gate:
                x[0] = T.cast(g[batch, at + i, head], "float32")
                if bias:
                    x[0] += dt_bias[head]
                y[0] = T.exp(-T.abs(x[0]))
                run[0] += log_decay(x[0], y[0], A_log[head]) * dG[e]
                dG[e] *= log_decay_slope(x[0], y[0], A_log[head])
                run[1] += dG[e]
            dg[batch, at + i, head] = dG[e]
    if gate:
        run[0] = T.warp_reduce_sum(run[0])
        run[1] = T.warp_reduce_sum(run[1])
        if lane == 0:
            dA_log[slot, head] = run[0]
            if bias:
                ddt_bias[slot, head] = run[1]
