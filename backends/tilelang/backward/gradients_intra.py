"""`gradients.py`, intra-chunk: the gradients of products of a chunk's tokens; one warpgroup.

    L_ij = e^{G_i - G_j}
    F = sum over value heads of tril(dO U^T * L)
    D = sum over value heads of -beta * tril(R U^T * L, -1)

scale F_ij is the gradient of q_i.k_j, D_ij that of k_i.k_j, where q and k are normalised rows. The
gradients of gates and beta need, for every value head, sums over rows and columns of

    tril(dO U^T * L) * qk     qk_ij = scale rq_i rk_j q_i.k_j for i > j, else 0
    beta * (R U^T) * N        N = tril(L * kk, -1), kk_ij = rk_i rk_j k_i.k_j

F, D, L, N: [C, C]; dO, R, U: [C, V]. R is the stored one, and beta R = `remaining_beta` R.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragment_sums import multiply, put_aside, sum_columns, sum_rows
from ..tile.gate_math import remaining_beta
from ..tile.largest import reciprocal_power
from ..tile.layout import LOG2_E
from .factors import Factor
from .gradients_memory import PairSum, row_scale


class IntraFragments:
    """Registers of the intra-chunk warpgroup."""

    def __init__(self, dtype: str) -> None:
        # product: the latest one
        self.product, self.F, self.D = (T.alloc_fragment((C, C), "float32") for _ in range(3))
        self.half = T.alloc_fragment((C, C), dtype)
        self.row_factor = T.alloc_fragment((C,), "float32")
        self.largest_scales = T.alloc_local((2,), "float32")


@T.macro
def multiply_raw_rows(x: Any, y: Any, product: Any) -> None:
    """product = x y^T of rows in shared memory, in blocks of 64 columns."""
    T.wgmma_gemm(x[0, :, :], y[0, :, :], product, transpose_B=True, clear_accum=True)
    if x.shape[0] == 2:
        T.wgmma_gemm(x[1, :, :], y[1, :, :], product, transpose_B=True)
    T.wait_wgmma(0)


@T.macro
def keep_norms(smem: Any, b: Any, parity: Any, thread: Any) -> None:
    """Copy rq and rk from the factors in buffer b, for the whole chunk: value heads overwrite the
    factors, but share the norms."""
    if thread < C:
        smem.norms[parity, 0, thread] = smem.factors[b, Factor.RQ, thread]
        smem.norms[parity, 1, thread] = smem.factors[b, Factor.RK, thread]


@T.macro
def compute_kk_qk(smem: Any, frag: Any, parity: Any, scale: Any) -> None:
    """Compute kk and qk, which all value heads of the chunk use."""
    multiply_raw_rows(smem.k, smem.k, frag.product)
    for i, j in T.Parallel(C, C):
        frag.product[i, j] *= smem.norms[parity, 1, i] * smem.norms[parity, 1, j]
    put_aside(frag.product, smem.pair_products(0), smem.products)
    multiply_raw_rows(smem.q, smem.k, frag.product)
    for i, j in T.Parallel(C, C):
        frag.product[i, j] *= T.if_then_else(
            i > j, scale * smem.norms[parity, 0, i] * smem.norms[parity, 1, j], 0.0
        )
    put_aside(frag.product, smem.pair_products(1), smem.products)


@T.macro
def apply_decay(smem: Any, frag: Any, b: Any) -> None:
    """product *= L. Above the diagonal the result may be infinite: callers replace it by 0."""
    for i in T.Parallel(C):
        frag.row_factor[i] = smem.factors[b, Factor.G, i] * LOG2_E
    for i, j in T.Parallel(C, C):
        frag.product[i, j] *= T.exp2(frag.row_factor[i] - smem.factors[b, Factor.G, j] * LOG2_E)


@T.macro
def accumulate_D(smem: Any, frag: Any, b: Any, thread: Any) -> None:
    """Add a value head to D, and sum (R U^T) * N over rows and, times beta, over columns."""
    T.wgmma_gemm(smem.R[b, :, :], smem.U[b, :, :], frag.product, clear_accum=True)
    T.wait_wgmma(0)
    apply_decay(smem, frag, b)
    for i, j in T.Parallel(C, C):
        frag.product[i, j] = T.if_then_else(i > j, frag.product[i, j], 0.0)
    for i in T.Parallel(C):
        frag.row_factor[i] = remaining_beta(smem.factors[b, Factor.BETA, i])
    for i, j in T.Parallel(C, C):
        frag.D[i, j] -= frag.row_factor[i] * frag.product[i, j]
    multiply(frag.product, smem.pair_products(0), smem.products)
    # before beta: dbeta needs the sums over rows without it
    sum_rows(frag.product, T.address_of(smem.pair_row_sums[b, PairSum.R_U, thread // 32 * 16]))
    for i, j in T.Parallel(C, C):
        frag.product[i, j] *= frag.row_factor[i]
    sum_columns(frag.product, T.address_of(smem.pair_column_sums[b, PairSum.R_U, thread // 32, 0]))


@T.macro
def accumulate_F(smem: Any, frag: Any, b: Any, thread: Any) -> None:
    """Add a value head to F, and sum tril(dO U^T * L) * qk over rows and columns."""
    T.wgmma_gemm(smem.do[b, :, :], smem.U[b, :, :], frag.product, clear_accum=True)
    T.wait_wgmma(0)
    apply_decay(smem, frag, b)
    for i, j in T.Parallel(C, C):
        frag.product[i, j] = T.if_then_else(i >= j, frag.product[i, j], 0.0)
    for i, j in T.Parallel(C, C):
        frag.F[i, j] += frag.product[i, j]
    multiply(frag.product, smem.pair_products(1), smem.products)
    sum_rows(frag.product, T.address_of(smem.pair_row_sums[b, PairSum.DO_U, thread // 32 * 16]))
    sum_columns(frag.product, T.address_of(smem.pair_column_sums[b, PairSum.DO_U, thread // 32, 0]))


@T.macro
def multiply_by_scales(smem: Any, b: Any) -> None:
    """Multiply the columns of dO and R by the scales that S^T and U^T were divided by."""
    for i, j in T.Parallel(*smem.do.shape[1:]):
        smem.do[b, i, j] *= row_scale(smem, b, j)
        smem.R[b, i, j] *= row_scale(smem, b, j)
    T.fence_proxy_async()


@T.macro
def stage_tiles(smem: Any, frag: Any, b: Any, parity: Any, scale: Any) -> None:
    """Write scale F and D to shared memory as operands, in float16 over their scale. The rows of q
    and k that they are multiplied by are not normalised, so rq and rk go into the tiles. b: buffer
    of the chunk's last value head."""
    if smem.has_scales:
        down = T.alloc_var("float32")
        down = reciprocal_power(frag.largest_scales[1])
        for i, j in T.Parallel(C, C):
            frag.F[i, j] *= down
            frag.D[i, j] *= down
    for i, j in T.Parallel(C, C):
        frag.F[i, j] *= scale
    for i, j in T.Parallel(C, C):
        frag.half[i, j] = frag.F[i, j] * smem.norms[parity, 1, j]
    T.copy(frag.half, smem.F_tile(0, b))
    for i, j in T.Parallel(C, C):
        frag.half[i, j] = frag.F[i, j] * smem.norms[parity, 0, i]
    T.copy(frag.half, smem.F_tile(1, b))
    for i, j in T.Parallel(C, C):
        frag.half[i, j] = frag.D[i, j] * smem.norms[parity, 1, j]
    T.copy(frag.half, smem.D)
    for i, j in T.Parallel(C, C):
        frag.half[i, j] = frag.D[i, j] * smem.norms[parity, 1, i]
    T.copy(frag.half, smem.D_t)
    T.fence_proxy_async()
