"""`gradients.py`, per token: gradients of beta, g and the gate's parameters, and small-beta dv.

    dv = beta R
    dbeta = rowsum(R * V) - rowsum(e^G * K * (R S^T)) - rowsum(N * (R U^T))
    dg_t = sum over all factors that contain g_t of (factor times its gradient):
           e^{G_i} and e^{G_i - G_j} with i >= t > j;  e^{gamma - G_j} with t > j;  e^gamma

All of a chunk and value head. K: normalised rows [C, K]; R, V, U: [C, V]; N: [C, C], see
`gradients_intra.py`. If the sigmoid or the gate is fused, the gradients then pass through it. Those
of A_log and dt_bias are sums over tokens, one number a chunk and value head.

R is the true one here, not the stored one (`stored_R_scale`). `reverse_scan.py` computes
rowsum(R * V) from R in float32. dbeta is rowsum(R * U) / beta as well,
but U has the rounding error of the right-hand side that it is solved from.
"""

from typing import Any

import tilelang.language as T

from gdn.definition import GATE_FLOOR
from gdn.problem import CHUNK as C

from ..tile.gate_math import log_decay, log_decay_slope, remaining_beta, stored_R_scale
from ..tile.indexing import rolled_loop
from ..tile.layout import LOG2_E
from .factors import Factor
from .gradients_inter import sum_blocks
from .gradients_memory import Dot, PairSum


@T.macro
def store_weak_dv(
    smem: Any, dv: Any, b: Any, batch: Any, token: Any, live: Any, head: Any, thread: Any
) -> None:
    """Replace R by dv = beta R in memory for tokens with small beta; by 64 threads. For all other
    tokens the stored R is dv already."""
    lanes = int(smem.R.shape[2]) // 8  # threads a row
    values = T.alloc_local((8,), smem.R.dtype)
    for step in rolled_loop(C * lanes // 64):
        i, j = step * (64 // lanes) + thread // lanes, thread % lanes * 8
        remaining = remaining_beta(smem.factors[b, Factor.BETA, i])
        if i < live and remaining != 1.0:
            for x in T.vectorized(8):
                values[x] = smem.R[b, i, j + x]
            for x in T.unroll(8):
                values[x] = remaining * values[x]
            for x in T.vectorized(8):
                dv[batch, token + i, head, j + x] = values[x]


@T.macro
def store_gate_gradients(
    smem: Any, g: Any, A_log: Any, dt_bias: Any, dg: Any, dbeta: Any, dA_log: Any, ddt_bias: Any,
    b: Any, batch: Any, token: Any, live: Any, slot: Any, head: Any, scale: Any, lane: Any,
    gate: bool, bias: bool, sigmoid: bool, double: bool,
) -> None:  # fmt: skip
    """Compute and store dbeta, dg and the chunk's share of dA_log and ddt_bias; by one warp, two
    tokens a lane."""
    dG = T.alloc_local((2,), "float32")  # gradient of G_i
    d_rest = T.alloc_local((2,), "float32")  # gradient of gamma - G_i
    d_beta = T.alloc_local((2,), "float32")
    sums = T.alloc_local((2,), "float32")
    shifted = T.alloc_local((2,), "float32")
    d_gamma = T.alloc_local((1,), "float32")  # gradient of gamma in e^gamma S

    # === dbeta, and the gradients of the exponents ===
    for e in T.unroll(2):
        i = lane * 2 + e
        e_G = T.exp2(smem.factors[b, Factor.G, i] * LOG2_E)
        beta, rk = smem.factors[b, Factor.BETA, i], smem.factors[b, Factor.RK, i]
        remaining = remaining_beta(beta)
        k_R_S = rk * e_G * sum_blocks(smem, b, Dot.R_S, i)
        dG[e] = (
            scale * smem.factors[b, Factor.RQ, i] * e_G * sum_blocks(smem, b, Dot.DO_S, i)
            - remaining * k_R_S
        )
        dG[e] += (
            smem.pair_row_sums[b, PairSum.DO_U, i]
            - remaining * smem.pair_row_sums[b, PairSum.R_U, i]
        )
        for warp in T.unroll(4):
            dG[e] += (
                smem.pair_column_sums[b, PairSum.R_U, warp, i]
                - smem.pair_column_sums[b, PairSum.DO_U, warp, i]
            )
        d_rest[e] = (
            rk
            * sum_blocks(smem, b, Dot.U_DS, i)
            * T.exp2((smem.factors[b, Factor.G, C - 1] - smem.factors[b, Factor.G, i]) * LOG2_E)
        )
        d_beta[e] = smem.rowsum_RV(b, i)
        d_beta[e] -= (k_R_S + smem.pair_row_sums[b, PairSum.R_U, i]) / stored_R_scale(beta)
        if sigmoid:
            d_beta[e] *= beta * (1.0 - (0.5 if double else 1.0) * beta)
        if i < live:
            dbeta[batch, token + i, head] = d_beta[e]

    # === dg_t = d_gamma + sum of dG_i with i >= t + sum of d_rest_i with i < t ===
    # Two prefix sums over the lanes: the difference of two sums would lose digits.
    sums[0] = dG[0] + dG[1]
    sums[1] = d_rest[0] + d_rest[1]
    for power in T.unroll(5):
        shifted[0] = T.shfl_down(sums[0], 1 << power)
        shifted[1] = T.shfl_up(sums[1], 1 << power)
        if lane + (1 << power) < 32:
            sums[0] += shifted[0]
        if lane >= (1 << power):
            sums[1] += shifted[1]
    shifted[0] = T.shfl_down(sums[0], 1)  # the lanes after
    shifted[1] = T.shfl_up(sums[1], 1)  # the lanes before
    if lane == 31:
        shifted[0] = 0.0
    if lane == 0:
        shifted[1] = 0.0
    d_gamma[0] = 0.0
    for warp in T.unroll(smem.S_dS.shape[1]):
        d_gamma[0] += smem.S_dS[b, warp]
    d_gamma[0] *= T.exp2(smem.factors[b, Factor.G, C - 1] * LOG2_E)
    dG[1] += shifted[0]
    dG[0] += dG[1]
    dG[0] += shifted[1] + d_gamma[0]
    dG[1] += shifted[1] + d_rest[0] + d_gamma[0]
    # dG is dg from here on

    # === the gate ===
    x = T.alloc_local((1,), "float32")  # g_raw + dt_bias
    y = T.alloc_local((1,), "float32")  # e^-|x|
    sums[0] = 0.0  # dA_log
    sums[1] = 0.0  # ddt_bias
    for e in T.unroll(2):
        i = lane * 2 + e
        if i < live:
            G_before = T.if_then_else(i > 0, smem.factors[b, Factor.G, T.max(i - 1, 0)], 0.0)
            if smem.factors[b, Factor.G, i] - G_before < GATE_FLOOR + 0.1:
                dG[e] = 0.0  # `sum_gates` clamped g
            elif gate:
                x[0] = T.cast(g[batch, token + i, head], "float32")
                if bias:
                    x[0] += dt_bias[head]
                y[0] = T.exp(-T.abs(x[0]))
                sums[0] += log_decay(x[0], y[0], A_log[head]) * dG[e]
                dG[e] *= log_decay_slope(x[0], y[0], A_log[head])
                sums[1] += dG[e]
            dg[batch, token + i, head] = dG[e]
    if gate:
        sums[0] = T.warp_reduce_sum(sums[0])
        sums[1] = T.warp_reduce_sum(sums[1])
        if lane == 0:
            dA_log[slot, head] = sums[0]
            if bias:
                ddt_bias[slot, head] = sums[1]
