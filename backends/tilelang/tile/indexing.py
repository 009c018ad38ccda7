"""Where the tokens of a chunk or a piece lie in the tensors of a call.

A piece is a sequence or a part of one that is scanned in parallel with the other parts; a chunk is
numbered like a piece of 64 tokens (`common/chunking.py`). A slot is the number of a chunk: tensors
that hold something for every chunk are [slots, ...].
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

SEQUENCE, START, LIVE = range(3)
"""What `locate_piece` writes: the sequence, the first token of the piece, and the number of tokens
from there to the end of the sequence. LIVE is 0 or less if no piece has this number."""
STOP, SLOT = 2, 3
"""What `piece_bounds` writes after SEQUENCE and START: the token after the last one, and the slot
of the first chunk. STOP is at most START if no piece has this number."""


class Fields:
    """Named int32 variables of a thread, in one array of registers.

    TileLang repeats an expression wherever it is used; a value in this array is computed once.
    Kernels read `x.head` and write `x["head"] = ...`, since TileLang does not translate assignments
    to attributes.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.array = T.alloc_local((len(names),), "int32")

    def __getattr__(self, name: str) -> Any:
        if name not in self.names:
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Any:
        return self.array[self.names.index(name)]

    def __setitem__(self, name: str, value: Any) -> None:
        T.buffer_store(self.array, value, [self.names.index(name)])


def strided(name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    """The declaration of a tensor with any strides, of which the last is 1."""
    batch = T.dynamic(f"{name}_stride0", "int64")  # may exceed 32 bits; the others take registers
    strides = (T.dynamic(f"{name}_stride{n}") for n in range(1, len(shape) - 1))
    return T.StridedTensor(shape, (batch, *strides, 1), dtype)


def rolled_loop(count: Any) -> Any:
    """A loop that nvcc does not unroll: the instruction caches of an SM are small."""
    return T.unroll(count, annotations={"pragma_unroll_factor": 1})


def token_bound(cu_seqlens: Any, n: Any, L: Any, unchecked: bool = True) -> Any:
    """The first token of sequence n; if cu_seqlens is unchecked and may hold anything, between 0
    and L."""
    bound = cu_seqlens[n]
    if unchecked:
        zero, most = (T.cast(x, bound.dtype) for x in (0, L))
        bound = T.min(T.max(bound, zero), most)
    return T.cast(bound, "int32")


@T.macro
def locate_piece(
    number: Any, cu_seqlens: Any, sequences: Any, length: Any, size: Any, place: Any, varlen: bool,
    unchecked: bool = False,
) -> None:  # fmt: skip
    """Find the piece of `size` tokens that has this number: write SEQUENCE, START and LIVE to
    `place`. length: tokens of a sequence if all have equally many; of all (varlen)."""
    if varlen:
        # binary search for the last sequence whose first piece has at most this number
        low = T.alloc_local((1,), "int32")
        high = T.alloc_local((1,), "int32")
        low[0] = 0
        high[0] = sequences
        while high[0] - low[0] > 1:
            middle = (low[0] + high[0]) // 2
            if token_bound(cu_seqlens, middle, length, unchecked) // size + middle <= number:
                low[0] = middle
            else:
                high[0] = middle
        start = token_bound(cu_seqlens, low[0], length, unchecked)
        place[SEQUENCE] = low[0]
        place[START] = start + (number - start // size - low[0]) * size
        place[LIVE] = token_bound(cu_seqlens, low[0] + 1, length, unchecked) - place[START]
        if unchecked:  # without order, the piece may lie before the first sequence
            place[LIVE] = T.if_then_else(place[START] < start, 0, place[LIVE])
    else:
        each = T.ceildiv(length, size)
        place[SEQUENCE] = number // each
        place[START] = number % each * size
        place[LIVE] = length - place[START]


@T.macro
def piece_bounds(
    piece: Any, cu_seqlens: Any, sequences: Any, L: Any, length: Any, place: Any,
    varlen: bool, cut: bool, unchecked: bool = False,
) -> None:  # fmt: skip
    """Find a piece of at most `length` tokens (cut) or a whole sequence (not cut): write SEQUENCE,
    START, STOP and SLOT to `place`."""
    if cut:
        locate_piece(piece, cu_seqlens, sequences, L, length, place, varlen, unchecked)
        place[STOP] = place[START] + T.min(place[LIVE], length)
    else:
        place[SEQUENCE] = piece
        place[START] = token_bound(cu_seqlens, piece, L, unchecked) if varlen else 0
        place[STOP] = token_bound(cu_seqlens, piece + 1, L, unchecked) if varlen else L
    if varlen:
        before = token_bound(cu_seqlens, place[SEQUENCE], L, unchecked)
        place[SLOT] = before // C + place[SEQUENCE] + (place[START] - before) // C
    else:
        place[SLOT] = place[SEQUENCE] * T.ceildiv(L, C) + place[START] // C


@T.macro
def piece_number(
    cu_seqlens: Any, L: Any, length: Any, place: Any, varlen: bool, unchecked: bool = False
) -> None:
    """Number the pieces of a sequence from 0: write number, of this piece, and last_number to
    `place`, a `Fields`."""
    before = token_bound(cu_seqlens, place.sequence, L, unchecked) if varlen else 0
    after = token_bound(cu_seqlens, place.sequence + 1, L, unchecked) if varlen else L
    place["number"] = (place.start - before) // length
    place["last_number"] = T.max(T.ceildiv(after - before, length) - 1, 0)
