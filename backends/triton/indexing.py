"""Where the tokens of a chunk or piece lie. `backends/common/chunking.py` defines slots.

`varlen` sequences are packed along T, with bounds in cu_seqlens. Others are B rows of T tokens.
Calls on a pool of states do not check cu_seqlens: whatever it holds, no token is outside 0..T.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("N", "T", "chunks_per_sequence", "pieces_per_sequence", "piece_chunks")
"""Sizes that change from call to call. Triton must not compile a kernel anew where one of them is 1
or a multiple of 16."""


@triton.jit
def load_bound(cu_seqlens, n, T):
    """The first token of sequence n, between 0 and T."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)


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
        first_token = load_bound(cu_seqlens, n, T) + index * C
        end = tl.where(index >= 0, load_bound(cu_seqlens, n + 1, T), first_token)
    else:
        first_token = (slot // chunks_per_sequence) * T + (slot % chunks_per_sequence) * C
        end = (slot // chunks_per_sequence + 1) * T
    return first_token, end - first_token


@triton.jit
def locate_piece(
    piece, cu_seqlens, N, pieces_per_sequence, piece_chunks, VARLEN: tl.constexpr,
    CUT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The sequence of a piece of piece_chunks chunks, and its index there. If sequences are not
    CUT, a piece is a whole sequence."""
    if VARLEN:
        n, index = piece, piece * 0
        if CUT:
            n, index = find_sequence(piece, cu_seqlens, N, piece_chunks * C)
    else:
        n, index = piece // pieces_per_sequence, piece % pieces_per_sequence
    return n, index


@triton.jit
def piece_bounds(
    n, index, cu_seqlens, T, chunks_per_sequence, piece_chunks,
    VARLEN: tl.constexpr, CUT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """First token, tokens and slot of the first chunk of piece number `index` of sequence n."""
    if VARLEN:
        sequence_start = load_bound(cu_seqlens, n, T)
        first_token = sequence_start + index * piece_chunks * C
        tokens = load_bound(cu_seqlens, n + 1, T) - first_token
        tokens = tl.where(index >= 0, tokens, 0)
        first_slot = sequence_start // C + n + index * piece_chunks
    else:
        first_token, tokens = n * T + index * piece_chunks * C, T - index * piece_chunks * C
        first_slot = n * chunks_per_sequence + index * piece_chunks
    if CUT:
        tokens = tl.minimum(tokens, piece_chunks * C)
    return first_token, tl.maximum(tokens, 0), first_slot
