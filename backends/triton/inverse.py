"""The inverse of a unit lower triangular matrix.

    (I + M)^-1 for strictly lower M [C, C]

The 8 x 8 blocks on the diagonal are inverted by forward substitution, all at once. Then neighbours
are merged, three times. Let X be the inverse of the diagonal blocks, and F the entries of M between
two neighbours. Then X - X F X is the inverse of blocks twice as large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot


@triton.jit
def invert_unit_lower(M, C: tl.constexpr, dtype: tl.constexpr):
    """(I + M)^-1 in float32, for a result that is stored in `dtype`.

    The products of a merge round their operands to float16 if dtype is bfloat16, since float16 has
    more mantissa bits. Otherwise they keep float32.
    """
    SIZE: tl.constexpr = 8
    BLOCKS: tl.constexpr = C // SIZE
    operand: tl.constexpr = tl.float16 if dtype == tl.bfloat16 else tl.float32

    # === substitution in the diagonal blocks, a row at a time ===
    block_row = tl.arange(0, BLOCKS)[:, None, None, None]
    block_column = tl.arange(0, BLOCKS)[None, None, :, None]
    row, column = tl.arange(0, SIZE)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    diagonal = tl.sum(  # [BLOCKS, 8, 8]
        tl.where(block_row == block_column, tl.reshape(M, [BLOCKS, SIZE, BLOCKS, SIZE]), 0.0),
        axis=2,
    )
    X = tl.where(row == column, 1.0, 0.0) + diagonal * 0
    for i in range(1, SIZE):
        M_row = tl.sum(tl.where(row == i, diagonal, 0.0), axis=1)  # [BLOCKS, 8]
        M_row_X = tl.sum(M_row[:, :, None] * X, axis=1)  # [BLOCKS, 8]
        X = tl.where(row == i, X - M_row_X[:, None, :], X)
    X = tl.reshape(tl.where(block_row == block_column, X[:, :, None, :], 0.0), [C, C])

    # === merging of neighbours ===
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for merge in tl.static_range(3):
        size = SIZE << merge
        neighbours = (i // size != j // size) & (i // (2 * size) == j // (2 * size))
        F = tl.where(neighbours, M, 0.0).to(operand)
        X -= dot(dot(X.to(operand), F).to(operand), X.to(operand))
    return X
