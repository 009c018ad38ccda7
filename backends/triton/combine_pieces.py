"""The state before each piece of a sequence that is cut, or backward the gradient after each piece.

    S <- M S + N                over the pieces, first to last
    dS <- M^T dS + N            over the pieces, last to first      backward (REVERSE)

A piece maps the state S before it to M S + N after it. Backward, N is the gradient before the piece
from a zero gradient after it.

A program takes a sequence, a value head and a block of BV columns of V. Reads M^T and N^T in
float32. `scan.py` leaves both in transfers [pieces, HV, V + K, K], N^T above M^T. With POOL the
states before the first and after the last piece lie in slots, by `pool.py`. Backward takes
only M^T from there, and N^T from `reverse_scan.py`, [pieces, HV, V, K]. Writes the state with
which each piece starts its scan [pieces, HV, V, K], and the state after the last one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .indexing import COUNTS, load_bound
from .launch import ANY_ALIGNMENT
from .pool import POOL_COUNTS, find_slot, load_from_slot, store_to_slot
from .tiles import compute_state_offsets, dot


@triton.jit(do_not_specialize=COUNTS + POOL_COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def combine_pieces_kernel(
    transfers, from_zero, state_in, piece_states, state_out, cu_seqlens, pool, indices, fresh,
    T, pieces_per_sequence, piece_chunks, null_index, slots, slot_stride, index_stride,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, V_FIRST: tl.constexpr, HAS_STATE_IN: tl.constexpr,
    STORE_STATE_OUT: tl.constexpr, REVERSE: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """from_zero holds N^T; in forward it is `transfers`. state_in and state_out are [N, HV, V, K]
    if V_FIRST, else [N, HV, K, V]."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = V // BV
    N_rows: tl.constexpr = V if REVERSE else V + K  # rows of a piece in from_zero
    sequence_head, first_v = program // blocks, (program % blocks) * BV
    n, head = sequence_head // HV, sequence_head % HV
    first_piece, pieces = n * pieces_per_sequence, pieces_per_sequence
    tokens = n * 0 + T
    if VARLEN:
        first_token = load_bound(cu_seqlens, n, T)
        first_piece = first_token // (piece_chunks * C) + n
        tokens = tl.maximum(load_bound(cu_seqlens, n + 1, T) - first_token, 0)
        pieces = tl.cdiv(tokens, piece_chunks * C).to(tl.int32)
    ends, _ = compute_state_offsets(sequence_head, first_v, K, V, K, BV, V_FIRST)
    S_T = tl.zeros([BV, K], tl.float32)
    if HAS_STATE_IN:
        S_T = tl.load(state_in + ends).to(tl.float32)
    if POOL:
        slot, _live, reads, writes = find_slot(
            n, indices, fresh, null_index, slots, index_stride, tokens > 0
        )
        S_T = load_from_slot(pool, slot, slot_stride, head, first_v, reads, K, V, K, BV, V_FIRST)
    row, column = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    for step in range(pieces):
        piece_head = (first_piece + (pieces - 1 - step if REVERSE else step)) * HV + head
        here, _ = compute_state_offsets(piece_head, first_v, K, V, K, BV, True)
        tl.store(piece_states + here, S_T)
        M_T = transfers + piece_head * ((V + K) * K) + V * K
        entries = column * K + row if REVERSE else row * K + column  # M or M^T, [K, K]
        N_T, _ = compute_state_offsets(piece_head, first_v, K, N_rows, K, BV, True)
        S_T = dot(S_T, tl.load(M_T + entries)) + tl.load(from_zero + N_T)
    if STORE_STATE_OUT:
        tl.store(state_out + ends, S_T)
    if POOL:
        store_to_slot(pool, S_T, slot, slot_stride, head, first_v, writes, K, V, K, BV, V_FIRST)
