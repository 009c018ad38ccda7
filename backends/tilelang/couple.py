"""Coupling the tokens of a chunk, by one warpgroup: all that needs no state.

    rq, rk = 1 / sqrt(sum x^2 + 1e-6) of the rows of q and k, where fused, else 1
    L_ij = exp(G_i - G_j),  A = (I + tril(beta_i L_ij rk_i rk_j k_i.k_j, -1))^-1
    A_v = A diag(beta),  P = scale tril(L_ij rq_i rk_j q_i.k_j)

The inverse: float32 substitution on the four diagonal blocks of 16, then two merges of neighbours,
each two products on the tensor cores with float16 operands: the block below two inverted ones, X
and Y, is -Y M X. In bfloat16 that is exact enough; in float16 a step of Newton's iteration follows.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout, make_linear_layout

from gdn.definition import L2_EPS
from gdn.problem import CHUNK as C

from .constants import (
    BETA,
    DECAY,
    INTO,
    LOG2_E,
    ONTO,
    READ,
    RK,
    RQ,
    SCORES,
    STRENGTH,
    THROUGH,
    G,
)
from .transposed import store


class Workspace:
    """Shared memory for one inverse at a time. Zeros around what is written stay as they are."""

    def __init__(self) -> None:
        half = "float16"
        self.inverse = T.alloc_shared((C, C), half)
        self.diagonal = T.alloc_shared((4, 16, 16), "float32")  # blocks of M
        self.below = T.alloc_shared((32, 16), half)  # -M between blocks 0 and 1, 2 and 3
        self.corner = T.alloc_shared((32, 32), half)  # -M's lower left quarter
        # of the inverse: the upper left quarter; and, in 32 columns, block 1 and below it the lower
        # right quarter, above which, in rows that nobody needs, blocks 0 and 2 are side by side
        self.top = T.alloc_shared((32, 32), half)
        self.side = T.alloc_shared((C, 32), half)
        self.tokens = T.alloc_shared((STRENGTH + 1, C), "float32")
        T.annotate_layout(
            {
                self.diagonal: make_linear_layout(self.diagonal),
                self.inverse: make_full_bank_swizzled_layout(self.inverse),
            }
        )


@T.macro
def clear_workspace(w: Any) -> None:
    for i, j in T.Parallel(C, C):
        w.inverse[i, j] = 0
    for i, j in T.Parallel(C, 32):
        w.side[i, j] = 0
    for i, j in T.Parallel(32, 32):
        w.top[i, j] = 0


@T.macro
def spread(M: Any, w: Any) -> None:
    """M, a fragment [C, C], to where `invert` wants its blocks; only what is below the diagonal is
    read there."""
    for i, j in T.Parallel(C, C):
        if i // 16 == j // 16:
            w.diagonal[i // 16, i % 16, j % 16] = M[i, j]
        if i // 16 == j // 16 + 1 and (i // 16) % 2 == 1:
            w.below[(i // 32) * 16 + i % 16, j % 16] = -M[i, j]
        if i >= 32 and j < 32:
            w.corner[i - 32, j] = -M[i, j]


@T.macro
def invert(w: Any, thread: Any) -> None:
    """w.inverse = (I + M)^-1, after `spread`."""
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
    half = T.alloc_local((16,), "float16")
    for j in T.vectorized(16):
        half[j] = x[j]
    if thread % 32 < 16:
        for j in T.vectorized(16):
            w.inverse[block * 16 + row, block * 16 + j] = half[j]
        if block < 2:
            for j in T.vectorized(16):
                w.top[block * 16 + row, block * 16 + j] = half[j]
        if block % 2 == 0:
            for j in T.vectorized(16):
                w.side[row, block // 2 * 16 + j] = half[j]
        if block > 0:
            for j in T.vectorized(16):
                w.side[block * 16 + row, block // 3 * 16 + j] = half[j]
        if block == 3:
            for j in T.vectorized(16):
                w.side[48 + row, j] = 0
    T.fence_proxy_async()
    T.sync_threads(1, 128)

    narrow = T.alloc_fragment((C, 16), "float16")
    through = T.alloc_fragment((C, 16), "float32")
    wide = T.alloc_fragment((C, 32), "float16")
    merged = T.alloc_fragment((C, 32), "float32")
    T.wgmma_gemm(w.side, w.below, through, clear_accum=True)
    T.wait_wgmma(0)
    T.copy(through, narrow)
    T.wgmma_gemm(narrow, w.side[0:16, :], merged, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, 32):
        if i // 16 == 1 and j < 16:
            w.inverse[i, j] = merged[i, j]
            w.top[i, j] = merged[i, j]
        if i // 16 == 3 and j >= 16:
            w.inverse[i, j + 16] = merged[i, j]
            w.side[i, j - 16] = merged[i, j]
    T.fence_proxy_async()
    T.sync_threads(1, 128)

    T.wgmma_gemm(w.side, w.corner, merged, clear_accum=True)
    T.wait_wgmma(0)
    T.copy(merged, wide)
    T.wgmma_gemm(wide, w.top, merged, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, 32):
        if i >= 32:
            w.inverse[i, j] = merged[i, j]
    T.fence_proxy_async()
    T.sync_threads(1, 128)


@T.macro
def refine(w: Any, M: Any, A: Any) -> None:
    """A, a fragment, and w.inverse = X + X (I - (I + M) X), given X in w.inverse; of M, a fragment,
    what is below the diagonal counts."""
    X = T.alloc_fragment((C, C), "float16")
    high = T.alloc_fragment((C, C), "float16")
    low = T.alloc_fragment((C, C), "float16")
    for i, j in T.Parallel(C, C):
        M[i, j] = T.if_then_else(i > j, M[i, j], 0.0)
    T.copy(M, high)
    for i, j in T.Parallel(C, C):
        low[i, j] = M[i, j] - T.cast(high[i, j], "float32")
    T.wgmma_gemm(high, w.inverse, A, clear_accum=True)
    T.wgmma_gemm(low, w.inverse, A)
    T.copy(w.inverse, X)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        high[i, j] = T.if_then_else(i == j, 1.0, 0.0) - T.cast(X[i, j], "float32") - A[i, j]
    T.sync_threads(1, 128)
    T.copy(high, w.inverse)
    T.fence_proxy_async()
    T.sync_threads(1, 128)
    T.wgmma_gemm(X, w.inverse, A, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        A[i, j] += T.cast(X[i, j], "float32")
    T.sync_threads(1, 128)
    T.copy(A, X)
    T.copy(X, w.inverse)


@T.macro
def norms_of_queries(q: Any, w: Any, thread: Any) -> None:
    """w.rq, two threads a row of q[0]."""
    part = T.alloc_local((8,), q.dtype)
    total = T.alloc_local((4,), "float32")
    width = q.shape[2] // 2
    for i in T.unroll(4):
        total[i] = 0.0
    for eight in T.unroll(width // 8):
        for i in T.vectorized(8):
            part[i] = q[0, thread // 2, thread % 2 * width + eight * 8 + i]
        for i in T.unroll(8):
            total[i % 4] += T.cast(part[i], "float32") * T.cast(part[i], "float32")
    total[0] += total[1] + (total[2] + total[3])
    total[1] = T.shfl_xor(total[0], 1)
    w.tokens[RQ, thread // 2] = T.rsqrt(total[0] + total[1] + L2_EPS)


@T.macro
def couple(
    m: Any, w: Any, walk: Any, slot: Any, head: Any, scale: Any, thread: Any, l2: bool
) -> None:
    """A_v and P in shared memory, and the factors of a chunk in `walk`; A itself stays in
    w.inverse."""
    x = T.alloc_fragment((C, C), "float32")  # of k and k
    y = T.alloc_fragment((C, C), "float32")  # of q and k, then A_v
    half = T.alloc_fragment((C, C), m.P.dtype)
    row = T.alloc_fragment((C,), "float32")
    factor = T.alloc_fragment((C,), "float32")
    T.wgmma_gemm(m.k[0, :, :], m.k[0, :, :], x, transpose_B=True, clear_accum=True)
    T.wgmma_gemm(m.q[0, :, :], m.k[0, :, :], y, transpose_B=True, clear_accum=True)
    if l2:
        norms_of_queries(m.q, w, thread)
        T.wait_wgmma(1)
        for i, j in T.Parallel(C, C):
            if i == j:
                w.tokens[RK, i] = T.rsqrt(x[i, j] + L2_EPS)
        T.sync_threads(1, 128)
    if thread < C:
        at = T.alloc_local((4,), "float32")
        at[0] = w.tokens[G, thread]
        at[1] = T.exp2(at[0])
        at[2] = w.tokens[RQ, thread] if l2 else 1.0
        at[3] = w.tokens[RK, thread] if l2 else 1.0
        walk[slot, head, ONTO, thread] = T.exp2(w.tokens[G, C - 1] - at[0]) * at[3]
        walk[slot, head, READ, thread] = at[1] * scale * at[2]
        walk[slot, head, THROUGH, thread] = -at[1] * at[3]
        w.tokens[INTO, thread] = at[0] - (T.log2(at[3]) if l2 else 0.0)
        w.tokens[SCORES, thread] = scale * at[2]
        w.tokens[STRENGTH, thread] = w.tokens[BETA, thread] * at[3]
        if thread == C - 1:
            walk[slot, head, DECAY, 0] = at[1]
    T.sync_threads(1, 128)
    for i in T.Parallel(C):
        row[i] = w.tokens[G, i]
        factor[i] = w.tokens[STRENGTH, i]
    T.wait_wgmma(1)
    # what is above the diagonal may be infinite, and is dropped
    for i, j in T.Parallel(C, C):
        x[i, j] = x[i, j] * T.exp2(row[i] - w.tokens[INTO, j]) * factor[i]
    spread(x, w)
    T.sync_threads(1, 128)
    for i in T.Parallel(C):
        factor[i] = w.tokens[SCORES, i]
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        y[i, j] = y[i, j] * T.exp2(row[i] - w.tokens[INTO, j]) * factor[i]
    for i, j in T.Parallel(C, C):
        y[i, j] = T.if_then_else(i >= j, y[i, j], 0.0)
    T.copy(y, half)
    store(half, m.P, 0, thread)
    invert(w, thread)
    if m.P.dtype == "float16":
        refine(w, x, y)
    else:
        for i, j in T.Parallel(C, C):
            y[i, j] = w.inverse[i, j]
    for i, j in T.Parallel(C, C):
        y[i, j] *= w.tokens[BETA, j]
    T.copy(y, half)
    store(half, m.A_v, 0, thread)


@T.macro
def save_chunk(
    w: Any, factors: Any, norms: Any, inverses: Any, slot: Any, head: Any, kh: Any, thread: Any,
    l2: bool,
) -> None:  # fmt: skip
    """What backward needs: G, beta, rq, rk, and A."""
    if thread < C:
        factors[slot, head, 0, thread] = w.tokens[G, thread] / LOG2_E
        factors[slot, head, 1, thread] = w.tokens[BETA, thread]
        if head == kh * (factors.shape[1] // norms.shape[1]):  # the group's first
            norms[slot, kh, 0, thread] = w.tokens[RQ, thread] if l2 else 1.0
            norms[slot, kh, 1, thread] = w.tokens[RK, thread] if l2 else 1.0
    for i, j in T.Parallel(C, C):
        inverses[slot, head, i, j] = w.inverse[i, j]
