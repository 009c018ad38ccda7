"""Where `matrix_gradients.py` leaves dP and F for `channel_gradients.py`.

grad_matrices [slots, HV, 2, C, ROW]: dP, with dP^T above the diagonal, and F, with (beta F)^T
there; in bfloat16, or float32 for other calls. Within blocks of CENTRED tokens, what lies above the
diagonal follows behind the C numbers of its row, and zeros take its place. So the pairs of the
first levels, and those of such blocks on one side of the diagonal, are loaded under masks of whole
blocks, and WGMMA reads them from shared memory: masks of single numbers would take registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.problem import CHUNK

from .channel_decay import CENTRED, LEVELS
from .tiles import round_to

ROW = tl.constexpr(CHUNK + CENTRED.value)


@triton.jit
def store_pairs(grad_matrices, lower, upper, index, C: tl.constexpr):
    """Store matrix number `index` from float32 tiles [C, C] of what lies below the diagonal, and
    above it."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    row = grad_matrices + (index * (C * ROW) + i * ROW)
    dtype: tl.constexpr = grad_matrices.dtype.element_ty
    near = j // CENTRED == i // CENTRED
    elsewhere = tl.where(near, 0.0, upper)
    tl.store(row + j, round_to(tl.where(i > j, lower, elsewhere), dtype))
    tl.store(row + (C + j % CENTRED), round_to(tl.where(i < j, upper, 0.0), dtype), mask=near)


@triton.jit
def load_level(grad_matrices, index, level, FAR: tl.constexpr, C: tl.constexpr):
    """The pairs of a level of matrix number `index`, [C, C], zero elsewhere. FAR: the level is a
    constant before CENTRED_LEVEL."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if FAR:  # divided by constants, so that the compiler sees whole blocks
        h: tl.constexpr = 1 << (LEVELS.value - 1 - level)
        pairs, column = j // h == (i // h) ^ 1, j
    else:
        shift = LEVELS - 1 - level
        pairs, column = j >> shift == (i >> shift) ^ 1, tl.where(i < j, C + j % CENTRED, j)
    return tl.load(grad_matrices + index * (C * ROW) + (i * ROW + column), mask=pairs, other=0.0)


@triton.jit
def load_near_pairs(grad_matrices, index, UPPER: tl.constexpr, C: tl.constexpr):
    """The pairs of blocks of CENTRED tokens below the diagonal or, if UPPER, above it, [C, C]."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    column = C + j % CENTRED if UPPER else j
    near = j // CENTRED == i // CENTRED
    return tl.load(grad_matrices + index * (C * ROW) + (i * ROW + column), mask=near, other=0.0)
