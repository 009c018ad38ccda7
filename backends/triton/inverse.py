"""The inverse of a unit lower triangular matrix.

    (I + M)^-1 for strictly lower M [C, C]

The 8 x 8 blocks on the diagonal are inverted by forward substitution, all at once. Then neighbours
are merged, three times. Let X be the inverse of the diagonal blocks, and F the entries of M between
two neighbours. Then X - X F X is the inverse of blocks twice as large.

The result is rounded to the call's dtype. How exact the products of a merge must be for that:

    float32                          exact to rounding
    float16                          three products of bfloat16 parts (`dot_split`)
    bfloat16, all entries |M| <= 1   operands in float16
    bfloat16, any entry |M| > 1      three products of bfloat16 parts

Larger entries than 1 occur where keys are close to each other and beta |k|^2 exceeds 1. There the
terms of X F X are much larger than their sum. docs/log/accuracy.md has the errors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, dot_split


@triton.jit
def _merge(X, M, C: tl.constexpr, SIZE: tl.constexpr, operand: tl.constexpr, SPLIT: tl.constexpr):
    """(I + M)^-1 in float32 from X, the inverse of its diagonal blocks of SIZE rows. Products are
    `dot_split` with SPLIT, else `dot` of operands in the dtype `operand`."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for merge in tl.static_range(3):
        size = SIZE << merge
        neighbours = (i // size != j // size) & (i // (2 * size) == j // (2 * size))
        F = tl.where(neighbours, M, 0.0)
        if SPLIT:
            X -= dot_split(dot_split(X, F), X)
        else:
            X -= dot(dot(X.to(operand), F.to(operand)).to(operand), X.to(operand))
    return X


@triton.jit
def invert_unit_lower(M, C: tl.constexpr, dtype: tl.constexpr):
    """(I + M)^-1 in float32, for a result that is stored in `dtype`."""
    SIZE: tl.constexpr = 8
    BLOCKS: tl.constexpr = C // SIZE

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
    if dtype == tl.float32:
        X = _merge(X, M, C, SIZE, tl.float32, False)
    elif dtype == tl.float16:
        X = _merge(X, M, C, SIZE, tl.float32, True)
    elif tl.max(tl.abs(M)) <= 1:
        X = _merge(X, M, C, SIZE, tl.float16, False)
    else:
        X = _merge(X, M, C, SIZE, tl.float32, True)
    return X
