"""`reverse_gradients.py`: what the intra-chunk warpgroup computes for a chunk. The equations are in
`reverse_scan.py` (P) and `gradients_intra.py` (F, D, N); F and D are scaled here, so that they
multiply raw rows of q and k:

    F_ij = scale rq_i rk_j e^{G_i - G_j} dO_i.U_j           for i >= j, else 0
    D_ij = -beta_i rk_i rk_j e^{G_i - G_j} R_i.U_j          for i > j, else 0
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragment_sums import sum_columns, sum_rows
from ..tile.fragments import load, store
from ..tile.gate_math import remaining_beta
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end
from .factors import Factor
from .gradients_memory import PairSum
from .reverse_gradients_memory import HALVES
from .reverse_scan_step import compute_factors

INTRA = 2
"""Named barrier of the intra-chunk warpgroup."""


class IntraFragments:
    """Registers of the intra-chunk warpgroup."""

    def __init__(self, dtype: str) -> None:
        self.product, self.kk, self.decay = (T.alloc_fragment((C, C), "float32") for _ in range(3))
        # decay: rk_j e^{G_i - G_j}, of a step from P to D
        self.half, self.P = (T.alloc_fragment((C, C), dtype) for _ in range(2))


@T.macro
def multiply_halves(
    x: Any, i: Any, y: Any, j: Any, product: Any, transpose_x: bool, transpose_y: bool
) -> None:
    """product = x[i] y[j] + x[i + 1] y[j + 1], each x or y transposed or not."""
    for h in HALVES:
        T.wgmma_gemm(
            x[i + h, :, :], y[j + h, :, :], product, transpose_A=transpose_x,
            transpose_B=transpose_y, clear_accum=h == 0,
        )  # fmt: skip


@T.macro
def compute_P(
    smem: Any, frag: Any, bars: Any, step: Any, live: Any, scale: Any, thread: Any
) -> None:
    """Compute P and the factors of the tokens of a step. Only the first step's chunk has rows past
    the end: they are cleared."""
    s = step % 2
    T.barrier_wait(bars.qk_ready[s], step // 2 % 2)
    if live < C:
        T.barrier_wait(bars.do_ready, 0)
        for h in HALVES:
            clear_rows_past_end((smem.q, smem.k), s * 2 + h, live)
            clear_rows_past_end((smem.do,), h, live)
        fence()
    if thread < C:
        compute_factors(smem, s, thread, live, scale)
        smem.column_exponent[s, thread] = smem.G2[s, thread] - T.log2(
            smem.factors[s, Factor.RK, thread]
        )
    T.sync_threads(INTRA, 128)
    multiply_halves(smem.q, s * 2, smem.k, s * 2, frag.product, False, True)
    for i, j in T.Parallel(C, C):
        frag.decay[i, j] = smem.G2[s, i] - smem.column_exponent[s, j]
    for i, j in T.Parallel(C, C):  # exponents may be infinite where they are not wanted
        frag.decay[i, j] = T.exp2(T.if_then_else(i >= j, frag.decay[i, j], -T.infinity("float32")))
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        frag.half[i, j] = smem.P_factor[s, i] * frag.product[i, j] * frag.decay[i, j]
    store(frag.half, smem.P, 0, thread)  # R was ready before, so P of the step before was read
    fence()
    T.barrier_arrive(bars.P_ready)


@T.macro
def compute_F(smem: Any, frag: Any, bars: Any, step: Any, thread: Any) -> None:
    """Compute F, and sum tril(dO U^T * L) * qk = dO U^T * P over rows and columns."""
    s, parity = step % 2, step % 2
    T.barrier_wait(bars.do_ready, parity)
    T.barrier_wait(bars.U_ready, parity)
    multiply_halves(smem.do, 0, smem.U, 0, frag.product, False, False)
    T.sync_warp()
    load(smem.P, 0, frag.P, thread)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.do_free)
    for i, j in T.Parallel(C, C):
        frag.half[i, j] = smem.P_factor[s, i] * frag.product[i, j] * frag.decay[i, j]
    T.barrier_wait(bars.F_free, parity ^ 1)
    store(frag.half, smem.F, 0, thread)
    fence()
    for i, j in T.Parallel(C, C):
        frag.product[i, j] *= T.cast(frag.P[i, j], "float32")
    for i, j in T.Parallel(C, C):  # its diagonal has no decay
        frag.product[i, j] = T.if_then_else(i > j, frag.product[i, j], 0.0)
    sum_rows(frag.product, T.address_of(smem.pair_row_sums[s, PairSum.DO_U, thread // 32 * 16]))
    sum_columns(frag.product, T.address_of(smem.pair_column_sums[s, PairSum.DO_U, thread // 32, 0]))
    T.barrier_arrive(bars.F_ready)


@T.macro
def compute_D(smem: Any, frag: Any, bars: Any, step: Any, thread: Any) -> None:
    """Compute D, and sum (R U^T) * N over rows and, times beta, over columns."""
    s, parity = step % 2, step % 2
    T.barrier_wait(bars.R_ready, parity)
    multiply_halves(smem.R, 0, smem.U, 0, frag.product, False, False)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.R_read)
    T.barrier_arrive(bars.U_free)
    for i, j in T.Parallel(C, C):
        frag.product[i, j] *= smem.factors[s, Factor.RK, i] * frag.decay[i, j]
    for i, j in T.Parallel(C, C):
        frag.product[i, j] = T.if_then_else(i > j, frag.product[i, j], 0.0)
    multiply_halves(smem.k, s * 2, smem.k, s * 2, frag.kk, False, True)
    T.sync_warp()
    for i, j in T.Parallel(C, C):
        frag.half[i, j] = -remaining_beta(smem.factors[s, Factor.BETA, i]) * frag.product[i, j]
    store(frag.half, smem.A, 0, thread)  # A has been used for R
    fence()
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        frag.product[i, j] *= frag.kk[i, j]
    sum_rows(frag.product, T.address_of(smem.pair_row_sums[s, PairSum.R_U, thread // 32 * 16]))
    for i, j in T.Parallel(C, C):
        frag.product[i, j] *= remaining_beta(smem.factors[s, Factor.BETA, i])
    sum_columns(frag.product, T.address_of(smem.pair_column_sums[s, PairSum.R_U, thread // 32, 0]))
    T.barrier_arrive(bars.D_ready)
