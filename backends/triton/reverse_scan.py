"""Backward, after the scan for the states: the gradient of the state, last chunk first.

    dU = P^T dO + e^{gamma - G} rk * (K dS),   R = A^T dU
    dS <- e^gamma dS + Q^T (scale e^G rq * dO) - K^T (beta e^G rk * R)

With a decay per channel (CHANNELS), of `channel_prepare.py`:

    dU = P^T dO + K_out dS,   dS <- e^gamma * dS + Q_in^T dO - W^T dU

`prepare.py` explains the notation. A program takes a sequence (or a piece), a value head and a
block of BV columns of V. As in `scan.py`, dS^T [BV, K] stays in registers, and sequences may be
CUT into pieces.

Reads q, k, `factors`, `matrices` and dO; with CHANNELS `decayed_rows` and `channel_decays` in place
of q and k. Writes R^T, or dU^T with CHANNELS, and the gradient of the state after every chunk
(STORE_STATES), and the gradient of the initial state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_buffers import (
    BETA,
    INVERSE,
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
    load_row_scales,
    load_state_decay,
    multiply_by_factor,
    store_matrix,
)
from .indexing import COUNTS, locate_piece, piece_bounds
from .launch import ANY_ALIGNMENT
from .tiles import (
    compute_state_offsets,
    dot,
    dot_rounded,
    find_batch_row,
    load_input_rows,
    load_rows,
    round_to,
)


@triton.jit
def reverse_scan_step(
    dS_T, q, k, factors, matrices, decayed_rows, channel_decays, grad_o, row_scales, R_out,
    grad_states, first_token, tokens, chunk_head, head, first_v,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STORE_STATES: tl.constexpr,
    CHANNELS: tl.constexpr, FULL: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
):  # fmt: skip
    """dS^T [BV, K] before a chunk, from dS_T after it. FULL: the chunk has all C tokens."""
    qk_head = head // (HV // H)
    dtype: tl.constexpr = k.dtype.element_ty
    if CHANNELS:
        queries = load_decayed_rows(decayed_rows, chunk_head, Q_IN, C, BK)  # [C, K]
        keys = load_decayed_rows(decayed_rows, chunk_head, K_OUT, C, BK)  # [C, K]
    else:
        queries = load_input_rows(
            q, first_token, tokens, qk_head, Q_STRIDES, K, 0, C, BK, FULL
        )  # [C, K]
        keys = load_input_rows(
            k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK, FULL
        )  # [C, K]
    dO_T = tl.trans(load_rows(grad_o, first_token, tokens, head, HV, V, first_v, C, BV, FULL))
    P = load_matrix(matrices, chunk_head * NUM_MATRICES + SCORES, 0, C, C, C)
    decay = load_state_decay(factors, channel_decays, chunk_head, C, BK, CHANNELS)

    if STORE_STATES:
        offsets, mask = compute_state_offsets(chunk_head, first_v, K, V, BK, BV, True)
        scales = load_row_scales(row_scales, chunk_head, first_v, V, BV, dtype)[:, None]
        tl.store(grad_states + offsets, round_to(scales * dS_T, dtype), mask=mask)
    dU_T = dot_rounded(dS_T, tl.trans(keys), dtype)  # [BV, C]
    dU_T = multiply_by_factor(dU_T, factors, chunk_head, U_TO_STATE, C, dtype, CHANNELS)
    dU_T += dot(dO_T, P)
    if CHANNELS:
        R_T = dU_T
        to_keys_T = multiply_by_factor(dU_T, factors, chunk_head, KS_TO_E, C, dtype, CHANNELS)
        keys = load_decayed_rows(decayed_rows, chunk_head, W, C, BK)
    else:
        A = load_matrix(matrices, chunk_head * NUM_MATRICES + INVERSE, 0, C, C, C)
        R_T = dot_rounded(dU_T, A, dtype)
        R_to_KS = load_factor(factors, chunk_head, BETA, C)
        R_to_KS *= load_factor(factors, chunk_head, KS_TO_E, C)
        to_keys_T = R_to_KS[None, :] * R_T
    if STORE_STATES:
        store_matrix(R_out, scales * R_T, chunk_head, first_v, V, BV, C)
    if CHANNELS and dtype != tl.float16:  # no factor, so that dO need not pass through registers
        dS_T = decay * dS_T + dot(dO_T, queries)
    else:
        QS_to_o = load_factor(factors, chunk_head, QS_TO_O, C)
        dS_T = decay * dS_T
        dS_T += dot_rounded(QS_to_o[None, :] * dO_T.to(tl.float32), queries, dtype)
    return dS_T - dot_rounded(to_keys_T, keys, dtype)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def reverse_scan_kernel(
    q, k, factors, matrices, decayed_rows, channel_decays, grad_o, row_scales, grad_final, R_out,
    grad_states, grad_initial, chunks_that_matter, cu_seqlens, N, T, chunks_per_sequence,
    pieces_per_sequence, piece_chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    V_FIRST: tl.constexpr, CHANNELS: tl.constexpr, HAS_GRAD_FINAL: tl.constexpr,
    STORE_GRAD_INITIAL: tl.constexpr, STORE_STATES: tl.constexpr, CUT: tl.constexpr,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
):  # fmt: skip
    """grad_final and grad_initial are [.., V, K] if V_FIRST, else [.., K, V]. Without grad_final,
    chunks_that_matter may be what `forgetting.py` finds."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    piece_head, first_v = program // blocks, ((program % blocks) * BV).to(tl.int32)
    piece, head = piece_head // HV, piece_head % HV
    n, index = locate_piece(
        piece, cu_seqlens, N, pieces_per_sequence, piece_chunks, VARLEN, CUT, C
    )  # fmt: skip
    first_token, tokens, slot = piece_bounds(
        n, index, cu_seqlens, T, chunks_per_sequence, piece_chunks, VARLEN, CUT, C
    )  # fmt: skip
    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    offsets, mask = compute_state_offsets(piece_head, first_v, K, V, BK, BV, V_FIRST)
    dS_T = tl.zeros([BV, BK], tl.float32)
    if HAS_GRAD_FINAL:
        dS_T = tl.load(grad_final + offsets, mask=mask, other=0.0).to(tl.float32)
    if chunks_that_matter is not None:
        tokens = tl.minimum(tokens, tl.load(chunks_that_matter + piece_head) * C)
    chunk_head = slot * HV + head
    full_chunks = (tokens // C).to(tl.int32)
    if tokens > full_chunks * C:
        dS_T = reverse_scan_step(
            dS_T, q, k, factors, matrices, decayed_rows, channel_decays, grad_o, row_scales, R_out,
            grad_states, first_token + full_chunks * C, tokens - full_chunks * C,
            chunk_head + full_chunks * HV, head, first_v,
            H, HV, K, V, BK, BV, C, STORE_STATES, CHANNELS, False, Q_STRIDES, K_STRIDES,
        )  # fmt: skip
    for step in range(full_chunks):
        chunk = full_chunks - 1 - step
        dS_T = reverse_scan_step(
            dS_T, q, k, factors, matrices, decayed_rows, channel_decays, grad_o, row_scales, R_out,
            grad_states, first_token + chunk * C, C, chunk_head + chunk * HV, head, first_v,
            H, HV, K, V, BK, BV, C, STORE_STATES, CHANNELS, True, Q_STRIDES, K_STRIDES,
        )  # fmt: skip
    if STORE_GRAD_INITIAL:
        tl.store(grad_initial + offsets, dS_T, mask=mask)
