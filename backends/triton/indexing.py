"""Where the tokens of a chunk or piece lie. `backends/common/chunking.py` defines slots.

`varlen` sequences are packed along T, with bounds in cu_seqlens. Others are B rows of T tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_sequence(slot, cu_seqlens, N, length):
    """The sequence that a slot belongs to, and the index of its chunk or piece there.

    It is the last sequence whose first slot is not past this one, by binary search. `length` is
    the tokens of a chunk or piece.
    """
    low, high = slot * 0, slot * 0 + N
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens + middle).to(tl.int64) // length + middle <= slot
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    return low, slot - (tl.load(cu_seqlens + low).to(tl.int64) // length + low)


@triton.jit
def locate_chunk(
    slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN: tl.constexpr, C: tl.constexpr
):
    """First token of the chunk in a slot, and tokens from there to the end of its sequence.

    The second number may exceed C. It is 0 or less if the slot is unused.
    """
    if VARLEN:
        n, index = find_sequence(slot, cu_seqlens, N, C)
        first_token = tl.load(cu_seqlens + n).to(tl.int64) + index * C
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
    else:
        first_token = (slot // chunks_per_sequence) * T + (slot % chunks_per_sequence) * C
        end = (slot // chunks_per_sequence + 1) * T
    return first_token, end - first_token


@triton.jit
def piece_bounds(
    piece, cu_seqlens, N, T, chunks_per_sequence, pieces_per_sequence, piece_chunks,
    VARLEN: tl.constexpr, CUT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """First token, tokens and slot of the first chunk of a piece of piece_chunks chunks.

    If sequences are not CUT, a piece is a whole sequence.
    """
    if VARLEN:
        n, index = piece, piece * 0
        if CUT:
            n, index = find_sequence(piece, cu_seqlens, N, piece_chunks * C)
        sequence_start = tl.load(cu_seqlens + n).to(tl.int64)
        first_token = sequence_start + index * piece_chunks * C
        tokens = tl.load(cu_seqlens + n + 1).to(tl.int64) - first_token
        first_slot = sequence_start // C + n + index * piece_chunks
    else:
        n, index = piece // pieces_per_sequence, piece % pieces_per_sequence
        first_token, tokens = n * T + index * piece_chunks * C, T - index * piece_chunks * C
        first_slot = n * chunks_per_sequence + index * piece_chunks
    if CUT:
        tokens = tl.minimum(tokens, piece_chunks * C)
    return first_token, tl.maximum(tokens, 0), first_slot
