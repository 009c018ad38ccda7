"""Where the tokens of a chunk or piece lie."""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C


def rolled_loop(count: Any) -> Any:
    """A loop that nvcc does not unroll: multiprocessors keep little code at hand."""
    return T.unroll(count, annotations={"pragma_unroll_factor": 1})


@T.macro
def locate_piece(
    number: Any, cu_seqlens: Any, sequences: Any, length: Any, size: Any, place: Any, varlen: bool
) -> None:
    """place = sequence, first token and tokens left (0 or less: not in use) of the piece of `size`
    tokens that has this number (see `cut.py`)."""
    if varlen:
        low = T.alloc_local((1,), "int32")
        high = T.alloc_local((1,), "int32")
        low[0] = 0
        high[0] = sequences
        while high[0] - low[0] > 1:
            middle = (low[0] + high[0]) // 2
            if T.cast(cu_seqlens[middle], "int32") // size + middle <= number:
                low[0] = middle
            else:
                high[0] = middle
        start = T.cast(cu_seqlens[low[0]], "int32")
        place[0] = low[0]
        place[1] = start + (number - start // size - low[0]) * size
        place[2] = T.cast(cu_seqlens[low[0] + 1], "int32") - place[1]
    else:
        each = T.ceildiv(length, size)
        place[0] = number // each
        place[1] = number % each * size
        place[2] = length - place[1]


@T.macro
def piece_bounds(
    piece: Any, cu_seqlens: Any, sequences: Any, L: Any, length: Any, place: Any,
    varlen: bool, cut: bool,
) -> None:  # fmt: skip
    """place = sequence, first token, end, and number of the first chunk of a piece of at most
    `length` tokens, or (not cut) of a whole sequence. Not in use: the end comes first."""
    if cut:
        locate_piece(piece, cu_seqlens, sequences, L, length, place, varlen)
        place[2] = place[1] + T.min(place[2], length)
    else:
        place[0] = piece
        place[1] = T.cast(cu_seqlens[piece], "int32") if varlen else 0
        place[2] = T.cast(cu_seqlens[piece + 1], "int32") if varlen else L
    if varlen:
        before = T.cast(cu_seqlens[place[0]], "int32")
        place[3] = before // C + place[0] + (place[1] - before) // C
    else:
        place[3] = place[0] * T.ceildiv(L, C) + place[1] // C


@T.macro
def piece_number(cu_seqlens: Any, L: Any, length: Any, place: Any, varlen: bool) -> None:
    """place[7] = which piece of its sequence `span` found, place[8] = which is the last."""
    before = T.cast(cu_seqlens[place[0]], "int32") if varlen else 0
    after = T.cast(cu_seqlens[place[0] + 1], "int32") if varlen else L
    place[7] = (place[1] - before) // length
    place[8] = T.max(T.ceildiv(after - before, length) - 1, 0)
