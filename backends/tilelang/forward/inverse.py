"""(I + M)^-1 of a chunk, M [C, C] strictly lower triangular, by one warpgroup.

Float32 substitution on the four diagonal blocks of 16, then two merges of neighbours, each two
products on the tensor cores with float16 operands: the block below two inverted ones, X and Y, is
-Y M X. In bfloat16 that is exact enough; in float16 a step of Newton's iteration follows.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout, make_linear_layout

from gdn.problem import CHUNK as C

BLOCK = 16


class Inverse:
    """Shared memory for one inverse at a time. Zeros around what is written stay as they are."""

    def __init__(self) -> None:
        half = "float16"
        self.whole = T.alloc_shared((1, C, C), half)
        self.diagonal = T.alloc_shared((4, 16, 16), "float32")  # blocks of M
        self.below = T.alloc_shared((32, 16), half)  # -M between blocks 0 and 1, 2 and 3
        self.corner = T.alloc_shared((32, 32), half)  # -M's lower left quarter
        # of the inverse: the upper left quarter; and, in 32 columns, block 1 and below it the lower
        # right quarter, above which, in rows that nobody needs, blocks 0 and 2 are side by side
        self.top = T.alloc_shared((32, 32), half)
        self.side = T.alloc_shared((C, 32), half)
        T.annotate_layout(
            {
                self.diagonal: make_linear_layout(self.diagonal),
                self.whole: make_full_bank_swizzled_layout(self.whole),
            }
        )


@T.macro
def clear_inverse(w: Any) -> None:
    for i, j in T.Parallel(C, C):
        w.whole[0, i, j] = 0
    for i, j in T.Parallel(C, 32):
        w.side[i, j] = 0
    for i, j in T.Parallel(32, 32):
        w.top[i, j] = 0


@T.macro
def spread(M: Any, w: Any, block: Any, warp: Any) -> None:
    """Columns 16 `block` to 16 `block` + 15 of M, a fragment [C, C] of which a warp has a block of
    rows, no less than `block`, to where they are wanted."""
    if warp == block:
        for i, j in T.Parallel(C, BLOCK):
            w.diagonal[i // BLOCK, i % BLOCK, j] = M[i, block * BLOCK + j]
    if warp >= 2 and block < 2:
        for i, j in T.Parallel(C, BLOCK):
            w.corner[i % 32, block * BLOCK + j] = -M[i, block * BLOCK + j]
    if warp == block + 1 and block % 2 == 0:
        for i, j in T.Parallel(C, BLOCK):
            w.below[i // 32 * BLOCK + i % BLOCK, j] = -M[i, block * BLOCK + j]


@T.macro
def substitute(w: Any, thread: Any) -> None:
    """The inverses of the diagonal blocks, by 64 threads: x (I + M) = a unit vector, a row each."""
    x = T.alloc_local((16,), "float32")
    known = T.alloc_local((16,), "float32")
    block, row = thread // 16, thread % 16
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
    for j in T.vectorized(16):
        w.whole[0, block * 16 + row, block * 16 + j] = half[j]
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


class Merge:
    """Registers of the warpgroup."""

    def __init__(self) -> None:
        self.narrow = T.alloc_fragment((C, 16), "float16")
        self.through = T.alloc_fragment((C, 16), "float32")
        self.wide = T.alloc_fragment((C, 32), "float16")
        self.merged = T.alloc_fragment((C, 32), "float32")


@T.macro
def begin_first_merge(w: Any, r: Any) -> None:
    T.wgmma_gemm(w.side, w.below, r.through, clear_accum=True)


@T.macro
def end_first_merge(w: Any, r: Any) -> None:
    """Blocks of 32 out of blocks of 16. One product has been issued since the beginning; it is done
    too, afterwards."""
    T.wait_wgmma(1)
    T.copy(r.through, r.narrow)
    T.wgmma_gemm(r.narrow, w.side[0:16, :], r.merged, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, 32):
        if i // 16 == 1 and j < 16:
            w.whole[0, i, j] = r.merged[i, j]
            w.top[i, j] = r.merged[i, j]
        if i // 16 == 3 and j >= 16:
            w.whole[0, i, j + 16] = r.merged[i, j]
            w.side[i, j - 16] = r.merged[i, j]


@T.macro
def begin_last_merge(w: Any, r: Any) -> None:
    T.wgmma_gemm(w.side, w.corner, r.merged, clear_accum=True)


@T.macro
def end_last_merge(w: Any, r: Any) -> None:
    T.wait_wgmma(0)
    T.copy(r.merged, r.wide)
    T.wgmma_gemm(r.wide, w.top, r.merged, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, 32):
        if i >= 32:
            w.whole[0, i, j] = r.merged[i, j]


@T.macro
def refine(w: Any, M: Any, A: Any) -> None:
    """A, a fragment, and w.whole = X + X (I - (I + M) X), given X in w.whole; of M, a fragment,
    what is below the diagonal counts."""
    X = T.alloc_fragment((C, C), "float16")
    high = T.alloc_fragment((C, C), "float16")
    low = T.alloc_fragment((C, C), "float16")
    for i, j in T.Parallel(C, C):
        M[i, j] = T.if_then_else(i > j, M[i, j], 0.0)
    T.copy(M, high)
    for i, j in T.Parallel(C, C):
        low[i, j] = M[i, j] - T.cast(high[i, j], "float32")
    T.wgmma_gemm(high, w.whole[0, :, :], A, clear_accum=True)
    T.wgmma_gemm(low, w.whole[0, :, :], A)
    T.copy(w.whole[0, :, :], X)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        high[i, j] = T.if_then_else(i == j, 1.0, 0.0) - T.cast(X[i, j], "float32") - A[i, j]
    T.sync_threads(1, 128)
    T.copy(high, w.whole[0, :, :])
    T.fence_proxy_async()
    T.sync_threads(1, 128)
    T.wgmma_gemm(X, w.whole[0, :, :], A, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        A[i, j] += T.cast(X[i, j], "float32")
    T.sync_threads(1, 128)
    T.copy(A, X)
    T.copy(X, w.whole[0, :, :])
