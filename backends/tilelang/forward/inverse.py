"""The inverse A = (I + M)^-1 of a chunk, by one warpgroup.

M is [C, C] and strictly lower triangular. Its four diagonal blocks of 16 rows are inverted by
substitution in float32. Two merges then double the blocks: where X and Y are the inverses of two
neighbouring diagonal blocks and M_YX is the block of M below X,

    (I + M)^-1 of both  =  [[X, 0], [-Y M_YX X, Y]]

Each merge is two WGMMA products with float16 operands. That is exact enough for bfloat16 outputs;
for float16 outputs a step of Newton's iteration follows: A <- A + A (I - (I + M) A).

A_ij and M_ij stand for the blocks [16, 16] of A and M.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout, make_linear_layout

from gdn.problem import CHUNK as C

BLOCK = 16


class InverseSmem:
    """Shared memory of one inverse at a time. Blocks that no function writes stay zero."""

    def __init__(self) -> None:
        half = "float16"
        self.A = T.alloc_shared((1, C, C), half)
        self.M_diagonal = T.alloc_shared((4, 16, 16), "float32")  # M_00, M_11, M_22, M_33
        self.M_below = T.alloc_shared((32, 16), half)  # -M_10 above -M_32
        self.M_corner = T.alloc_shared((32, 32), half)  # minus the lower left quarter of M
        self.A_upper = T.alloc_shared((32, 32), half)  # the upper left quarter of A
        # Rows 32 to 63: the lower right quarter of A. Rows 16 to 31: A_11. Rows 0 to 15, which no
        # left operand needs: A_00 and A_22 side by side, the right operand of the first merge.
        self.A_lower = T.alloc_shared((C, 32), half)
        T.annotate_layout(
            {
                self.M_diagonal: make_linear_layout(self.M_diagonal),
                self.A: make_full_bank_swizzled_layout(self.A),
            }
        )


@T.macro
def clear_inverse(inv: Any) -> None:
    """Zero the buffers that hold blocks of A."""
    for i, j in T.Parallel(C, C):
        inv.A[0, i, j] = 0
    for i, j in T.Parallel(C, 32):
        inv.A_lower[i, j] = 0
    for i, j in T.Parallel(32, 32):
        inv.A_upper[i, j] = 0


@T.macro
def scatter_M(M: Any, inv: Any, block: Any, warp: Any) -> None:
    """Store the column block number `block` of M, a fragment [C, C], to the buffers that need it.
    A warp has one row block of M; its number is at least `block`."""
    if warp == block:
        for i, j in T.Parallel(C, BLOCK):
            inv.M_diagonal[i // BLOCK, i % BLOCK, j] = M[i, block * BLOCK + j]
    if warp >= 2 and block < 2:
        for i, j in T.Parallel(C, BLOCK):
            inv.M_corner[i % 32, block * BLOCK + j] = -M[i, block * BLOCK + j]
    if warp == block + 1 and block % 2 == 0:
        for i, j in T.Parallel(C, BLOCK):
            inv.M_below[i // 32 * BLOCK + i % BLOCK, j] = -M[i, block * BLOCK + j]


@T.macro
def invert_diagonal_blocks(inv: Any, thread: Any) -> None:
    """Invert the diagonal blocks by 64 threads: each solves x (I + M_bb) = a unit vector for one
    row x of a block."""
    x = T.alloc_local((16,), "float32")
    M_row = T.alloc_local((16,), "float32")
    block, row = thread // 16, thread % 16
    for j in T.unroll(16):
        x[j] = T.if_then_else(row == j, 1.0, 0.0)
    for k in T.unroll(15):
        for four in T.unroll(4 - (k + 1) // 4):
            for j in T.vectorized(4):
                M_row[four * 4 + j] = inv.M_diagonal[block, 15 - k, four * 4 + j]
        for j in T.unroll(15 - k):
            x[j] -= x[15 - k] * M_row[j]
    half = T.alloc_local((16,), "float16")
    for j in T.vectorized(16):
        half[j] = x[j]
    for j in T.vectorized(16):
        inv.A[0, block * 16 + row, block * 16 + j] = half[j]
    if block < 2:
        for j in T.vectorized(16):
            inv.A_upper[block * 16 + row, block * 16 + j] = half[j]
    if block % 2 == 0:
        for j in T.vectorized(16):
            inv.A_lower[row, block // 2 * 16 + j] = half[j]
    if block > 0:
        for j in T.vectorized(16):
            inv.A_lower[block * 16 + row, block // 3 * 16 + j] = half[j]
    if block == 3:  # where the chunk before has left its A_32
        for j in T.vectorized(16):
            inv.A_lower[48 + row, j] = 0


class MergeFragments:
    """Registers of the warpgroup: products, and float16 copies of them, the next left operands."""

    def __init__(self) -> None:
        self.left_16 = T.alloc_fragment((C, 16), "float16")
        self.product_16 = T.alloc_fragment((C, 16), "float32")
        self.left_32 = T.alloc_fragment((C, 32), "float16")
        self.product_32 = T.alloc_fragment((C, 32), "float32")


@T.macro
def begin_merge_to_32(inv: Any, frag: Any) -> None:
    """Start the first product: -A_11 M_10 and -A_33 M_32."""
    T.wgmma_gemm(inv.A_lower, inv.M_below, frag.product_16, clear_accum=True)


@T.macro
def end_merge_to_32(inv: Any, frag: Any) -> None:
    """Merge blocks of 16 to blocks of 32. One product has been issued since the start of the merge;
    both are done afterwards."""
    T.wait_wgmma(1)
    T.copy(frag.product_16, frag.left_16)
    T.wgmma_gemm(frag.left_16, inv.A_lower[0:16, :], frag.product_32, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, 32):
        if i // 16 == 1 and j < 16:
            inv.A[0, i, j] = frag.product_32[i, j]
            inv.A_upper[i, j] = frag.product_32[i, j]
        if i // 16 == 3 and j >= 16:
            inv.A[0, i, j + 16] = frag.product_32[i, j]
            inv.A_lower[i, j - 16] = frag.product_32[i, j]


@T.macro
def begin_merge_to_64(inv: Any, frag: Any) -> None:
    """Start the first product: the lower right quarter of A times the corner of -M."""
    T.wgmma_gemm(inv.A_lower, inv.M_corner, frag.product_32, clear_accum=True)


@T.macro
def end_merge_to_64(inv: Any, frag: Any) -> None:
    """Merge blocks of 32 to the whole inverse."""
    T.wait_wgmma(0)
    T.copy(frag.product_32, frag.left_32)
    T.wgmma_gemm(frag.left_32, inv.A_upper, frag.product_32, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, 32):
        if i >= 32:
            inv.A[0, i, j] = frag.product_32[i, j]


@T.macro
def refine_inverse(inv: Any, M: Any, A: Any) -> None:
    """A and inv.A = X + X (I - (I + M) X), given X in inv.A. A and M are fragments; only what is
    below the diagonal of M is read."""
    X = T.alloc_fragment((C, C), "float16")
    high = T.alloc_fragment((C, C), "float16")
    low = T.alloc_fragment((C, C), "float16")
    for i, j in T.Parallel(C, C):
        M[i, j] = T.if_then_else(i > j, M[i, j], 0.0)
    T.copy(M, high)
    for i, j in T.Parallel(C, C):
        low[i, j] = M[i, j] - T.cast(high[i, j], "float32")
    T.wgmma_gemm(high, inv.A[0, :, :], A, clear_accum=True)
    T.wgmma_gemm(low, inv.A[0, :, :], A)
    T.copy(inv.A[0, :, :], X)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        high[i, j] = T.if_then_else(i == j, 1.0, 0.0) - T.cast(X[i, j], "float32") - A[i, j]
    T.sync_threads(1, 128)
    T.copy(high, inv.A[0, :, :])
    T.fence_proxy_async()
    T.sync_threads(1, 128)
    T.wgmma_gemm(X, inv.A[0, :, :], A, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        A[i, j] += T.cast(X[i, j], "float32")
    T.sync_threads(1, 128)
    T.copy(A, X)
    T.copy(X, inv.A[0, :, :])
