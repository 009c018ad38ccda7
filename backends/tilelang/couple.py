"""Coupling the tokens of a chunk, by one warpgroup: all that needs no state.

    L_ij = exp(G_i - G_j),  A = (I + tril(beta_i L_ij rk_i rk_j k_i.k_j, -1))^-1
    A_v = A diag(beta),  A_k = -A diag(beta e^G rk),  P = scale tril(L_ij rq_i rk_j q_i.k_j)

The inverse: float32 substitution on the four diagonal blocks of 16, then two merges of neighbours,
each two products on the tensor cores with float16 operands: the block below two inverted ones, X
and Y, is -Y M X.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang.layout import make_linear_layout

from gdn.problem import CHUNK as C

LOG2_E = 1.4426950408889634
PITCH = C + 8
"""Columns of the float32 inverse in shared memory, so that rows start in different banks."""


class Workspace:
    """Shared memory for one inverse at a time. Zeros around what is written stay as they are."""

    def __init__(self) -> None:
        half, full = "float16", "float32"
        self.diagonal = T.alloc_shared((4, 16, 16), full)  # blocks of M
        self.inverse = T.alloc_shared((C, PITCH), full)
        self.odd = T.alloc_shared((C, 32), half)  # inverses of blocks 1 and 3, side by side
        self.even = T.alloc_shared((16, 32), half)  # of blocks 0 and 2
        self.below = T.alloc_shared((32, 16), half)  # -M between blocks 0 and 1, 2 and 3
        self.right = T.alloc_shared((C, 32), half)  # the inverse's lower right quarter
        self.top = T.alloc_shared((32, 32), half)  # and its upper left one
        self.corner = T.alloc_shared((32, 32), half)  # -M's lower left quarter
        # factors of rows and columns
        self.through, self.into, self.scores, self.strength = (
            T.alloc_shared((C,), full) for _ in range(4)
        )
        linear = (self.diagonal, self.inverse)
        T.annotate_layout({buffer: make_linear_layout(buffer) for buffer in linear})


@T.macro
def clear_workspace(w: Any) -> None:
    for i, j in T.Parallel(C, PITCH):
        w.inverse[i, j] = 0
    for i, j in T.Parallel(C, 32):
        w.odd[i, j] = 0
        w.right[i, j] = 0
    for i, j in T.Parallel(32, 32):
        w.top[i, j] = 0


@T.macro
def spread(M: Any, w: Any) -> None:
    """Strictly lower M, a fragment [C, C], to where `invert` wants its blocks."""
    for i, j in T.Parallel(C, C):
        if i // 16 == j // 16:
            w.diagonal[i // 16, i % 16, j % 16] = M[i, j]
        if i // 16 == j // 16 + 1 and (i // 16) % 2 == 1:
            w.below[(i // 32) * 16 + i % 16, j % 16] = -M[i, j]
        if i >= 32 and j < 32:
            w.corner[i - 32, j] = -M[i, j]


@T.macro
def invert(w: Any, thread: Any, barrier: Any) -> None:
    """w.inverse = (I + M)^-1, by 128 threads, after `spread`."""
    # x (I + M) = a unit vector: a row of a block's inverse a thread, twice over
    x = T.alloc_local((16,), "float32")
    known = T.alloc_local((16,), "float32")
    block, row = thread // 32, thread % 16
    for j in T.unroll(16):
        x[j] = T.if_then_else(row == j, 1.0, 0.0)
    for k in T.unroll(15):
        for four in T.unroll(4 - (k + 1) // 4):
            for j in T.vectorized(4):
                known[four * 4 + j] = w.diagonal[block, 15 - k, four * 4 + j]
        for j in T.unroll(15 - k):
            x[j] -= x[15 - k] * known[j]
    if thread % 32 < 16:
        for j in T.vectorized(16):
            w.inverse[block * 16 + row, block * 16 + j] = x[j]
        if block % 2 == 1:
            for j in T.vectorized(16):
                w.odd[block * 16 + row, block // 2 * 16 + j] = x[j]
        else:
            for j in T.vectorized(16):
                w.even[row, block // 2 * 16 + j] = x[j]
        if block < 2:
            for j in T.vectorized(16):
                w.top[block * 16 + row, block * 16 + j] = x[j]
        else:
            for j in T.vectorized(16):
                w.right[block * 16 + row, block * 16 + j - 32] = x[j]
    T.fence_proxy_async()
    T.sync_threads(barrier, 128)

    half = T.alloc_fragment((C, 16), "float16")
    through = T.alloc_fragment((C, 16), "float32")
    merged = T.alloc_fragment((C, 32), "float32")
    T.wgmma_gemm(w.odd, w.below, through, clear_accum=True)
    T.wait_wgmma(0)
    T.copy(through, half)
    T.wgmma_gemm(half, w.even, merged, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, 32):
        if i // 16 == 1 and j < 16:
            w.inverse[i, j] = merged[i, j]
            w.top[i, j] = merged[i, j]
        if i // 16 == 3 and j >= 16:
            w.inverse[i, j + 16] = merged[i, j]
            w.right[i, j - 16] = merged[i, j]
    T.fence_proxy_async()
    T.sync_threads(barrier, 128)

    wide = T.alloc_fragment((C, 32), "float16")
    T.wgmma_gemm(w.right, w.corner, merged, clear_accum=True)
    T.wait_wgmma(0)
    T.copy(merged, wide)
    T.wgmma_gemm(wide, w.top, merged, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, 32):
        if i >= 32:
            w.inverse[i, j] = merged[i, j]
    T.sync_threads(barrier, 128)


@T.macro
def couple(m: Any, w: Any, s: Any, s_k: Any, scale: Any, thread: Any, barrier: Any, l2: bool) -> None:
    """A_v, A_k, P and the factors of a chunk, by 128 threads; A itself stays in w.inverse."""
    x = T.alloc_fragment((C, C), "float32")  # M, then P, then A_v and A_k
    T.wgmma_gemm(m.k[s_k, :, :], m.k[s_k, :, :], x, transpose_B=True, clear_accum=True)
    if thread < C:
        m.read[s, thread] = T.exp2(m.G[s_k, thread]) * scale
        m.onto[s, thread] = T.exp2(m.G[s_k, C - 1] - m.G[s_k, thread])
        w.through[thread] = -m.beta[s_k, thread] * T.exp2(m.G[s_k, thread])
        if l2:
            m.read[s, thread] *= m.rq[s_k, thread]
            m.onto[s, thread] *= m.rk[s_k, thread]
            w.through[thread] *= m.rk[s_k, thread]
            w.into[thread] = m.G[s_k, thread] - T.log2(m.rk[s_k, thread])
            w.scores[thread] = scale * m.rq[s_k, thread]
            w.strength[thread] = m.beta[s_k, thread] * m.rk[s_k, thread]
        if thread == 0:
            m.decay[s, 0] = T.exp2(m.G[s_k, C - 1])
    if l2:
        T.sync_threads(barrier, 128)
    T.wait_wgmma(0)
    # masked after the exponential: what is above the diagonal may be infinite, and is dropped
    for i, j in T.Parallel(C, C):
        x[i, j] *= T.exp2(m.G[s_k, i] - (w.into[j] if l2 else m.G[s_k, j]))
    for i, j in T.Parallel(C, C):
        x[i, j] = T.if_then_else(i > j, x[i, j] * (w.strength[i] if l2 else m.beta[s_k, i]), 0.0)
    spread(x, w)
    T.wgmma_gemm(m.q[s_k, :, :], m.k[s_k, :, :], x, transpose_B=True, clear_accum=True)
    T.sync_threads(barrier, 128)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        x[i, j] *= T.exp2(m.G[s_k, i] - (w.into[j] if l2 else m.G[s_k, j]))
    for i, j in T.Parallel(C, C):
        x[i, j] = T.if_then_else(i >= j, x[i, j] * (w.scores[i] if l2 else scale), 0.0)
    T.copy(x, m.P[s, :, :])
    invert(w, thread, barrier)
    for i, j in T.Parallel(C, C):
        x[i, j] = w.inverse[i, j] * m.beta[s_k, j]
    T.copy(x, m.A_v[s, :, :])
    for i, j in T.Parallel(C, C):
        x[i, j] = w.inverse[i, j] * w.through[j]
    T.copy(x, m.A_k[s, :, :])


@T.macro
def save_chunk(
    m: Any, w: Any, factors: Any, inverses: Any, slot: Any, head: Any, s_k: Any, thread: Any, l2: bool
) -> None:
    """What backward needs: G, beta, rq, rk, and A."""
    if thread < C:
        factors[slot, head, 0, thread] = m.G[s_k, thread] / LOG2_E
        factors[slot, head, 1, thread] = m.beta[s_k, thread]
        factors[slot, head, 2, thread] = m.rq[s_k, thread] if l2 else 1.0
        factors[slot, head, 3, thread] = m.rk[s_k, thread] if l2 else 1.0
    for i, j in T.Parallel(C, C):
        inverses[slot, head, i, j] = w.inverse[i, j]
