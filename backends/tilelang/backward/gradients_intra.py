"""Of a chunk's gradients, what its tokens owe each other, [C, C], by one warpgroup.

    L_ij = e^{G_i - G_j},  N = tril(L_ij rk_i rk_j k_i.k_j, -1)
    F = tril(dO U^T * L),  D = -beta * tril(R U^T * L, -1)

both summed over the value heads; with the sums over rows and columns, for the gradients of the
gates and of beta, of F * (scale rq_i rk_j q_i.k_j) below the diagonal and of beta * (R U^T * N).
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragment_sums import multiply, put_aside, sum_columns, sum_rows
from ..tile.gate_math import remaining_beta
from ..tile.layout import LOG2_E


class Pairs:
    """Registers of the warpgroup."""

    def __init__(self, dtype: str) -> None:
        self.one, self.F, self.D = (T.alloc_fragment((C, C), "float32") for _ in range(3))
        self.half = T.alloc_fragment((C, C), dtype)
        self.row = T.alloc_fragment((C,), "float32")


@T.macro
def multiply_rows(x: Any, y: Any, into: Any) -> None:
    """into = x y^T of the raw rows, which lie in blocks of 64 columns."""
    T.wgmma_gemm(x[0, :, :], y[0, :, :], into, transpose_B=True, clear_accum=True)
    if x.shape[0] == 2:
        T.wgmma_gemm(x[1, :, :], y[1, :, :], into, transpose_B=True)
    T.wait_wgmma(0)


@T.macro
def keep_norms(m: Any, b: Any, even: Any, thread: Any) -> None:
    """rq and rk, the same for all value heads, from the factors in place b."""
    if thread < C:
        m.norms[even, 0, thread] = m.factors[b, 2, thread]
        m.norms[even, 1, thread] = m.factors[b, 3, thread]


@T.macro
def multiply_keys(m: Any, p: Any, even: Any, scale: Any) -> None:
    """The normalised rows of k with those of k and, times scale, q, put aside for all value
    heads."""
    multiply_rows(m.k, m.k, p.one)
    for i, j in T.Parallel(C, C):
        p.one[i, j] *= m.norms[even, 1, i] * m.norms[even, 1, j]
    put_aside(p.one, m.kk)
    multiply_rows(m.q, m.k, p.one)
    for i, j in T.Parallel(C, C):
        p.one[i, j] *= T.if_then_else(i > j, scale * m.norms[even, 0, i] * m.norms[even, 1, j], 0.0)
    put_aside(p.one, m.qk)


@T.macro
def decay(m: Any, p: Any, b: Any) -> None:
    """p.one *= L; what is above the diagonal may become infinite, and is to be dropped."""
    for i in T.Parallel(C):
        p.row[i] = m.factors[b, 0, i] * LOG2_E
    for i, j in T.Parallel(C, C):
        p.one[i, j] *= T.exp2(p.row[i] - m.factors[b, 0, j] * LOG2_E)


@T.macro
def couple_writes(m: Any, p: Any, b: Any, thread: Any) -> None:
    """R U^T: what every update of the chunk owes to the earlier ones."""
    T.wgmma_gemm(m.R[b, :, :], m.U[b, :, :], p.one, clear_accum=True)
    T.wait_wgmma(0)
    decay(m, p, b)
    for i, j in T.Parallel(C, C):
        p.one[i, j] = T.if_then_else(i > j, p.one[i, j], 0.0)
    for i in T.Parallel(C):
        p.row[i] = remaining_beta(m.factors[b, 1, i])
    for i, j in T.Parallel(C, C):
        p.D[i, j] -= p.row[i] * p.one[i, j]
    multiply(p.one, m.kk)
    sum_rows(p.one, T.address_of(m.rows[b, 0, thread // 32 * 16]))
    for i, j in T.Parallel(C, C):
        p.one[i, j] *= p.row[i]
    sum_columns(p.one, T.address_of(m.columns[b, 0, thread // 32, 0]))


@T.macro
def couple_reads(m: Any, p: Any, b: Any, thread: Any) -> None:
    """dO U^T: what every output of the chunk owes to the updates up to it."""
    T.wgmma_gemm(m.do[b, :, :], m.U[b, :, :], p.one, clear_accum=True)
    T.wait_wgmma(0)
    decay(m, p, b)
    for i, j in T.Parallel(C, C):
        p.one[i, j] = T.if_then_else(i >= j, p.one[i, j], 0.0)
    for i, j in T.Parallel(C, C):
        p.F[i, j] += p.one[i, j]
    multiply(p.one, m.qk)
    sum_rows(p.one, T.address_of(m.rows[b, 1, thread // 32 * 16]))
    sum_columns(p.one, T.address_of(m.columns[b, 1, thread // 32, 0]))


@T.macro
def hand_over(m: Any, p: Any, even: Any, scale: Any) -> None:
    """The sums over the value heads, as left operands, with the norms of the rows they meet."""
    for i, j in T.Parallel(C, C):
        p.F[i, j] *= scale
    for i, j in T.Parallel(C, C):
        p.half[i, j] = p.F[i, j] * m.norms[even, 1, j]
    T.copy(p.half, m.F_q)
    for i, j in T.Parallel(C, C):
        p.half[i, j] = p.F[i, j] * m.norms[even, 0, i]
    T.copy(p.half, m.F_k)
    for i, j in T.Parallel(C, C):
        p.half[i, j] = p.D[i, j] * m.norms[even, 1, j]
    T.copy(p.half, m.D)
    for i, j in T.Parallel(C, C):
        p.half[i, j] = p.D[i, j] * m.norms[even, 1, i]
    T.copy(p.half, m.D_turned)
    T.fence_proxy_async()
