"""The inverse of a unit lower triangular matrix in memory, for bfloat16 calls.

    A = (I + M)^-1 for strictly lower M [C, C], as in `inverse.py`

The 8 x 8 blocks on the diagonal are inverted by substitution: row i of X is e_i - sum_{r < i} M_ir
row r, and a thread takes a column of a block. It reads M from memory, since all threads of a block
read the same numbers, and leaves X in place of the blocks. Then neighbours are merged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_blocks import product_entries
from .tiles import dot, dot_split

SIZE = tl.constexpr(8)
"""Rows of a block that is inverted by substitution."""


@triton.jit
def _unit(column, i: tl.constexpr):
    """Row i of the identity."""
    return tl.where(column % SIZE == i, 1.0, 0.0)


@triton.jit
def _invert_blocks(matrices, chunk_head, C: tl.constexpr):
    """Replace the blocks of M on the diagonal by the inverse of I + M there."""
    column = tl.arange(0, C)
    M = product_entries(matrices, chunk_head, column // SIZE * SIZE, column // SIZE * SIZE, C)
    x0 = _unit(column, 0)
    x1 = _unit(column, 1) - tl.load(M + C) * x0
    x2 = _unit(column, 2) - tl.load(M + 2 * C) * x0 - tl.load(M + (2 * C + 1)) * x1
    x3 = _unit(column, 3) - tl.load(M + 3 * C) * x0 - tl.load(M + (3 * C + 1)) * x1
    x3 -= tl.load(M + (3 * C + 2)) * x2
    x4 = _unit(column, 4) - tl.load(M + 4 * C) * x0 - tl.load(M + (4 * C + 1)) * x1
    x4 = x4 - tl.load(M + (4 * C + 2)) * x2 - tl.load(M + (4 * C + 3)) * x3
    x5 = _unit(column, 5) - tl.load(M + 5 * C) * x0 - tl.load(M + (5 * C + 1)) * x1
    x5 = x5 - tl.load(M + (5 * C + 2)) * x2 - tl.load(M + (5 * C + 3)) * x3
    x5 -= tl.load(M + (5 * C + 4)) * x4
    x6 = _unit(column, 6) - tl.load(M + 6 * C) * x0 - tl.load(M + (6 * C + 1)) * x1
    x6 = x6 - tl.load(M + (6 * C + 2)) * x2 - tl.load(M + (6 * C + 3)) * x3
    x6 = x6 - tl.load(M + (6 * C + 4)) * x4 - tl.load(M + (6 * C + 5)) * x5
    x7 = _unit(column, 7) - tl.load(M + 7 * C) * x0 - tl.load(M + (7 * C + 1)) * x1
    x7 = x7 - tl.load(M + (7 * C + 2)) * x2 - tl.load(M + (7 * C + 3)) * x3
    x7 = x7 - tl.load(M + (7 * C + 4)) * x4 - tl.load(M + (7 * C + 5)) * x5
    x7 -= tl.load(M + (7 * C + 6)) * x6
    tl.debug_barrier()  # the blocks are read
    X = M + column % SIZE
    tl.store(X, x0)
    tl.store(X + C, x1)
    tl.store(X + 2 * C, x2)
    tl.store(X + 3 * C, x3)
    tl.store(X + 4 * C, x4)
    tl.store(X + 5 * C, x5)
    tl.store(X + 6 * C, x6)
    tl.store(X + 7 * C, x7)
    tl.debug_barrier()  # X is written


@triton.jit
def _merge(X, M, C: tl.constexpr, SPLIT: tl.constexpr):
    """(I + M)^-1 from X, the inverse of the blocks on the diagonal. SPLIT: see `inverse.py`."""
    i, j = tl.arange(0, C)[:, None] // SIZE, tl.arange(0, C)[None, :] // SIZE
    for merge in range(3):
        F = tl.where((i >> merge) ^ (j >> merge) == 1, M, 0.0)  # M is 0 above the diagonal
        if SPLIT:
            X -= dot_split(dot_split(X, F), X)
        else:
            half = X.to(tl.float16)
            X -= dot(dot(half, F.to(tl.float16)).to(tl.float16), half)
    return X


@triton.jit
def invert_in_memory(matrices, chunk_head, C: tl.constexpr, SMALL: tl.constexpr):
    """(I + M)^-1 in float32, [C, C]. SMALL: no entry of M is above 1."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    entries = product_entries(matrices, chunk_head, i, j, C)
    exact = False
    if not SMALL:
        exact = tl.max(tl.abs(tl.load(entries, mask=i > j, other=0.0))) > 1
    _invert_blocks(matrices, chunk_head, C)
    M = tl.load(entries, mask=i >= j, other=0.0)
    X = tl.where(i // SIZE == j // SIZE, M, 0.0)
    if SMALL:
        X = _merge(X, M, C, False)
    elif exact:
        X = _merge(X, M, C, True)
    else:
        X = _merge(X, M, C, False)
    return X
