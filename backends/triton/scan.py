"""Forward, stage 2: the state, chunk by chunk, and o. Backward runs it again for the states.

    U = A beta V - A beta (e^G rk * (K S))
    O = scale e^G rq * (Q S) + P U                 with OUTPUT
    S <- e^gamma S + K^T (e^{gamma - G} rk * U)

With a decay per channel (CHANNELS), of `channel_prepare.py` or `channel_forward.py`:

    U = A beta V - W S,   O = Q_in S + P U,   S <- e^gamma * S + K_out^T U

`prepare.py` explains the notation. A program takes a sequence (or a piece), a value head and a
block of BV columns of V. All is computed transposed: S^T [BV, K] and U^T [BV, C] are the left
operands of their products. Tensor cores read left operands from registers, so that the state stays
in registers.

Reads k, v, `factors`, `matrices`, and with OUTPUT also q; with CHANNELS `decayed_rows` and
`channel_decays` in place of q and k. Writes o and the final state in forward.
Writes the state before every chunk and U^T in backward (STORE_STATES).

Where sequences are few, they are CUT into pieces that are scanned in parallel, twice. A piece maps
a state S to M S + N.

1. The transfer scan (TRANSFER) finds N, the final state from zero, and M. M is the scan of the
   identity with v = 0. It takes the rows of the identity as K more columns of V.
2. `combine_pieces.py` computes the state before each piece.
3. The final scan starts each piece from that state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_buffers import (
    A_BETA,
    K_OUT,
    KS_TO_E,
    NUM_MATRICES,
    Q_IN,
    QS_TO_O,
    SCORES,
    U_TO_STATE,
    W,
    load_decayed_rows,
    load_factor,
    load_matrix,
    load_state_decay,
    multiply_by_factor,
    store_matrix,
    store_row_scales,
)
from .indexing import COUNTS, load_bound, locate_piece, piece_bounds
from .launch import ANY_ALIGNMENT
from .pool import (
    POOL_COUNTS,
    find_slot,
    load_from_slot,
    next_checkpoint,
    store_checkpoints,
    store_to_slot,
)
from .tiles import (
    clear_rows,
    compute_state_offsets,
    dot,
    dot_rounded,
    find_batch_row,
    load_input_rows,
    round_rows,
    round_to,
    store_rows_transposed,
)


@triton.jit
def scan_step(
    S_T, q, k, v, factors, matrices, decayed_rows, channel_decays, o, states, U_out, row_scales,
    first_token, tokens, chunk_head, head, first_v,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, OUTPUT: tl.constexpr,
    STORE_STATES: tl.constexpr, TRANSFER: tl.constexpr, CHANNELS: tl.constexpr,
    FULL: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
):  # fmt: skip
    """S^T [BV, K] after a chunk, from S_T before it. FULL: the chunk has all C tokens."""
    qk_head = head // (HV // H)
    dtype: tl.constexpr = k.dtype.element_ty
    if CHANNELS:
        keys = load_decayed_rows(decayed_rows, chunk_head, K_OUT, C, BK)  # [C, K]
    else:
        keys = load_input_rows(
            k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK, FULL
        )  # [C, K]
    first_column = first_v % V if TRANSFER else first_v
    values = load_input_rows(
        v, first_token, tokens, head, V_STRIDES, V, first_column, C, BV, FULL
    )  # [C, BV]
    if TRANSFER:
        values = tl.where(first_v < V, values, 0.0)
    A_beta_T = tl.trans(load_matrix(matrices, chunk_head * NUM_MATRICES + A_BETA, 0, C, C, C))
    decay = load_state_decay(factors, channel_decays, chunk_head, C, BK, CHANNELS)
    S_T_rounded, S_scales = round_rows(S_T, dtype)
    if CHANNELS:
        W_T = tl.trans(load_decayed_rows(decayed_rows, chunk_head, W, C, BK))
        WS_T = multiply_by_factor(
            dot(S_T_rounded, W_T), factors, chunk_head, KS_TO_E, C, dtype, CHANNELS
        )
        U_T = dot(tl.trans(values), A_beta_T) - S_scales * WS_T  # [BV, C]
    else:
        # with S's scales: e^G rk * k has elements of at most 1, if keys are normalised
        KS_to_E = load_factor(factors, chunk_head, KS_TO_E, C)
        KS_T = round_to(KS_to_E[None, :] * dot(S_T_rounded, tl.trans(keys)), dtype)  # [BV, C]
        U_T = dot(tl.trans(values), A_beta_T) - S_scales * dot(KS_T, A_beta_T)  # [BV, C]
    if STORE_STATES:
        offsets, mask = compute_state_offsets(chunk_head, first_v, K, V, BK, BV, True)
        down = store_row_scales(row_scales, S_T, U_T, chunk_head, first_v, V, BV, dtype)
        tl.store(states + offsets, round_to(down * S_T, dtype), mask=mask)
        store_matrix(U_out, down * U_T, chunk_head, first_v, V, BV, C)
    if OUTPUT:
        if CHANNELS:
            queries = load_decayed_rows(decayed_rows, chunk_head, Q_IN, C, BK)  # [C, K]
        else:
            queries = load_input_rows(
                q, first_token, tokens, qk_head, Q_STRIDES, K, 0, C, BK, FULL
            )  # [C, K]
        P_T = tl.trans(load_matrix(matrices, chunk_head * NUM_MATRICES + SCORES, 0, C, C, C))
        QS_T = dot(S_T_rounded, tl.trans(queries))
        O_T = S_scales * multiply_by_factor(QS_T, factors, chunk_head, QS_TO_O, C, dtype, CHANNELS)
        O_T += dot_rounded(U_T, P_T, dtype)
        store_rows_transposed(o, O_T, first_token, tokens, head, HV, V, first_v, C, BV)
    U_T = multiply_by_factor(U_T, factors, chunk_head, U_TO_STATE, C, dtype, CHANNELS)
    return decay * S_T + dot_rounded(U_T, keys, dtype)


@triton.jit
def scan_chunks(
    S_T, q, k, v, factors, matrices, decayed_rows, channel_decays, o, states, U_out, row_scales,
    first_token, chunk_head, head, first_v, begin, end,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, OUTPUT: tl.constexpr,
    STORE_STATES: tl.constexpr, TRANSFER: tl.constexpr, CHANNELS: tl.constexpr,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
):  # fmt: skip
    """S^T after the full chunks from begin to end, from S_T before them."""
    for chunk in range(begin, end):
        S_T = scan_step(
            S_T, q, k, v, factors, matrices, decayed_rows, channel_decays, o, states, U_out,
            row_scales, first_token + chunk * C, C, chunk_head + chunk * HV, head, first_v,
            H, HV, K, V, BK, BV, C, OUTPUT, STORE_STATES, TRANSFER, CHANNELS, True,
            Q_STRIDES, K_STRIDES, V_STRIDES,
        )  # fmt: skip
    return S_T


@triton.jit(do_not_specialize=COUNTS + POOL_COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def scan_kernel(
    q, k, v, factors, matrices, decayed_rows, channel_decays, initial_state, o, final_state, states,
    U_out, row_scales, first_chunks, cu_seqlens, pool, indices, fresh, checkpoint_offsets,
    checkpoint_indices, checkpoints,
    N, T, chunks_per_sequence, pieces_per_sequence, piece_chunks,
    null_index, slots, slot_stride, index_stride, checkpoint_columns,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    V_FIRST: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr,
    CHANNELS: tl.constexpr, OUTPUT: tl.constexpr, STORE_STATES: tl.constexpr,
    TRANSFER: tl.constexpr, CUT: tl.constexpr,
    POOL: tl.constexpr, POOL_V_FIRST: tl.constexpr, CHECKPOINTS: tl.constexpr,
    CLEAR_TAIL: tl.constexpr,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
):  # fmt: skip
    """initial_state and final_state are [.., V, K] if V_FIRST, else [.., K, V].

    With TRANSFER, final_state is [pieces, HV, V + K, K]: N^T above M^T; first_chunks is what
    `forgetting.py` finds, or None.

    POOL: states come from slots of a pool and go back there, by `pool.py`, unless sequences are
    CUT. CHECKPOINTS: the padded number of checkpoints a sequence, or 0. CLEAR_TAIL: tokens past the
    last sequence get zeros.
    """
    program = tl.program_id(0).to(tl.int64)
    rows: tl.constexpr = V + K if TRANSFER else V
    blocks: tl.constexpr = (rows + BV - 1) // BV
    piece_head, first_v = program // blocks, ((program % blocks) * BV).to(tl.int32)
    piece, head = piece_head // HV, piece_head % HV
    n, index = locate_piece(
        piece, cu_seqlens, N, pieces_per_sequence, piece_chunks, VARLEN, CUT, C
    )  # fmt: skip
    first_token, tokens, slot = piece_bounds(
        n, index, cu_seqlens, T, chunks_per_sequence, piece_chunks, VARLEN, CUT, C
    )  # fmt: skip
    offsets, mask = compute_state_offsets(piece_head, first_v, K, rows, BK, BV, V_FIRST)
    S_T = tl.zeros([BV, BK], tl.float32)
    if HAS_INITIAL:
        S_T = tl.load(initial_state + offsets, mask=mask, other=0.0).to(tl.float32)
    if TRANSFER:  # from row V on, the identity
        diagonal = first_v - V + tl.arange(0, BV)[:, None] == tl.arange(0, BK)[None, :]
        S_T = tl.where(diagonal, 1.0, S_T)
    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    v = find_batch_row(v, first_token, T, V_STRIDES)
    if POOL:
        own_slot, live, reads, writes = find_slot(
            n, indices, fresh, null_index, slots, index_stride, tokens > 0
        )
        if not CUT:
            S_T = load_from_slot(
                pool, own_slot, slot_stride, head, first_v, reads, K, V, BK, BV, POOL_V_FIRST
            )
        if OUTPUT:  # tokens of skipped sequences
            for chunk in range(tl.where(live, 0, (tokens + C - 1) // C).to(tl.int32)):
                start = first_token + chunk * C
                clear_rows(o, start, start, first_token + tokens, head, HV, V, first_v, C, BV)
        tokens = tl.where(live, tokens, 0)
    chunk_head = slot * HV + head
    begin = first_v * 0
    if first_chunks is not None:  # of a transfer scan
        first = tl.load(first_chunks + piece_head)
        S_T = tl.where(first >= 0, 0.0, S_T)
        tokens = tl.where((first >= 0) & (first_v >= V), 0, tokens)
        begin = tl.maximum(first, 0)
    full_chunks = (tokens // C).to(tl.int32)
    if CHECKPOINTS:  # the loop over chunks stays innermost, so that Triton pipelines its loads
        before = index * (piece_chunks * C)
        while begin < full_chunks:
            end = next_checkpoint(
                begin, full_chunks, before, n, checkpoint_offsets, checkpoint_columns, CHECKPOINTS,
                C,
            )  # fmt: skip
            S_T = scan_chunks(
                S_T, q, k, v, factors, matrices, decayed_rows, channel_decays, o, states, U_out,
                row_scales, first_token, chunk_head, head, first_v, begin, end,
                H, HV, K, V, BK, BV, C, OUTPUT, STORE_STATES, TRANSFER, CHANNELS,
                Q_STRIDES, K_STRIDES, V_STRIDES,
            )  # fmt: skip
            store_checkpoints(
                S_T, before + end * C, n, checkpoint_offsets, checkpoint_indices, checkpoints,
                pool, null_index, slots, slot_stride, checkpoint_columns, head, first_v,
                HV, K, V, BK, BV, POOL_V_FIRST, CHECKPOINTS,
            )  # fmt: skip
            begin = end
    else:
        S_T = scan_chunks(
            S_T, q, k, v, factors, matrices, decayed_rows, channel_decays, o, states, U_out,
            row_scales, first_token, chunk_head, head, first_v, begin, full_chunks,
            H, HV, K, V, BK, BV, C, OUTPUT, STORE_STATES, TRANSFER, CHANNELS,
            Q_STRIDES, K_STRIDES, V_STRIDES,
        )  # fmt: skip
    if tokens > full_chunks * C:
        S_T = scan_step(
            S_T, q, k, v, factors, matrices, decayed_rows, channel_decays, o, states, U_out,
            row_scales, first_token + full_chunks * C, tokens - full_chunks * C,
            chunk_head + full_chunks * HV, head, first_v,
            H, HV, K, V, BK, BV, C, OUTPUT, STORE_STATES, TRANSFER, CHANNELS, False,
            Q_STRIDES, K_STRIDES, V_STRIDES,
        )  # fmt: skip
    if STORE_FINAL:
        tl.store(final_state + offsets, S_T, mask=mask)
    if POOL and not CUT:
        store_to_slot(
            pool, S_T, own_slot, slot_stride, head, first_v, writes, K, V, BK, BV, POOL_V_FIRST
        )
    if OUTPUT and CLEAR_TAIL:  # tokens past the last sequence, each scan a share of their chunks
        end, pieces = load_bound(cu_seqlens, N, T), tl.num_programs(0) // (HV * blocks)
        for chunk in range(piece.to(tl.int32), ((T - end + C - 1) // C).to(tl.int32), pieces):
            clear_rows(o, end + chunk * C, end, T, head, HV, V, first_v, C, BV)
