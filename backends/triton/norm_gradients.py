"""Backward with a decay per channel, at the end: what sums over channels and value heads.

`channel_gradients.py` leaves dQ and dK of each value head in float32, and of each tile of channels

row_sums [slots, HV, TILES, NUM_ROW_SUMS, C], float32
    THROUGH_STATES, THROUGH_PAIRS  rowsum(K * the bracket of dK), in its two parts
    A_LOG_TERMS                    what tokens add to dA_log
    Q_DOT_DQ, K_DOT_DK             rowsum(Q * dQ) and rowsum(K * dK)

A program takes a chunk and q/k head, and sums in order, so that two runs are bit-equal. Reads q, k,
`factors`, `products`, row_sums, dQ and dK. Writes dbeta, the chunk's term of dA_log and, unless
`channel_gradients.py` did, dq and dk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import backpropagate_norm
from .channel_decay import NUMBERS
from .chunk_buffers import BETA, RK, RQ, load_factor
from .indexing import COUNTS, locate_chunk
from .key_gradients import MIN_DIVISOR
from .tiles import (
    clear_rows,
    clear_scalars,
    find_batch_row,
    load_input_rows,
    row_entries,
    store_rows,
    store_scalars,
)

NUM_ROW_SUMS = tl.constexpr(5)
THROUGH_STATES, THROUGH_PAIRS, A_LOG_TERMS, Q_DOT_DQ, K_DOT_DK = (tl.constexpr(i) for i in range(5))


@triton.jit
def row_sum_entries(row_sums, tile, which: tl.constexpr, C: tl.constexpr):
    """Pointers to row sums [C] of tile number `tile` of all."""
    return row_sums + (tile * NUM_ROW_SUMS + which) * C + tl.arange(0, C)


@triton.jit
def _finish(
    grad_rows, dx, x, index, r, x_dot_dx, first_token, tokens, qk_head, STRIDES: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    C: tl.constexpr, L2_NORM: tl.constexpr,
):  # fmt: skip
    """Write dx: tile number `index` of grad_rows and those of the group's other value heads, in
    order, through the norm of x with its reciprocals r."""
    for first_channel in range(0, K, BD):
        tile = tl.load(row_entries(grad_rows, index, first_channel, C, BK, BD))
        for group in range(1, HV // H):
            tile += tl.load(row_entries(grad_rows, index + group * 2, first_channel, C, BK, BD))
        if L2_NORM:
            rows = load_input_rows(
                x, first_token, tokens, qk_head, STRIDES, K, first_channel, C, BD
            )
            tile = backpropagate_norm(tile, rows.to(tl.float32), r, x_dot_dx)
        store_rows(dx, tile, first_token, tokens, qk_head, H, K, first_channel, C, BD)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=NUMBERS)
def norm_gradients_kernel(
    q, k, factors, products, row_sums, grad_rows, dq, dk, dbeta, dA_log, cu_seqlens,
    N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    C: tl.constexpr, VARLEN: tl.constexpr, L2_NORM: tl.constexpr, FUSED_SIGMOID: tl.constexpr,
    BETA_SCALE: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
):  # fmt: skip
    """dA_log [slots, HV] takes one term a chunk. The host sums them."""
    program = tl.program_id(0).to(tl.int64)
    slot, qk_head = program // H, program % H
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if VARLEN:  # tokens past the last sequence
        end = tl.load(cu_seqlens + N).to(tl.int64)
        if first_token + C > end:
            for first_channel in range(0, K, BD):
                clear_rows(dq, first_token, end, T, qk_head, H, K, first_channel, C, BD)
                clear_rows(dk, first_token, end, T, qk_head, H, K, first_channel, C, BD)
            for head in range(qk_head * (HV // H), (qk_head + 1) * (HV // H)):
                clear_scalars(dbeta, first_token, end, T, head, HV, C)
    if tokens <= 0:
        return
    TILES: tl.constexpr = (K + BD - 1) // BD
    Q_dot_dQ, K_dot_dK = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for group in range(HV // H):
        head = qk_head * (HV // H) + group
        chunk_head = slot * HV + head
        K_bracket, K_bracket_size = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        A_log_terms = tl.zeros([C], tl.float32)
        for i in range(TILES):
            tile = chunk_head * TILES + i
            through_states = tl.load(row_sum_entries(row_sums, tile, THROUGH_STATES, C))
            through_pairs = tl.load(row_sum_entries(row_sums, tile, THROUGH_PAIRS, C))
            K_bracket += through_states + through_pairs
            K_bracket_size += tl.abs(through_states) + tl.abs(through_pairs)
            if dA_log is not None:
                A_log_terms += tl.load(row_sum_entries(row_sums, tile, A_LOG_TERMS, C))
            if L2_NORM:
                Q_dot_dQ += tl.load(row_sum_entries(row_sums, tile, Q_DOT_DQ, C))
                K_dot_dK += tl.load(row_sum_entries(row_sums, tile, K_DOT_DK, C))
        strength = load_factor(factors, chunk_head, BETA, C)  # beta, [C]
        of_head = products + chunk_head * (3 * C) + tl.arange(0, C)
        R_dot_V, R_dot_U = tl.load(of_head), tl.load(of_head + C)
        # U is rounded once, so that its product has the smaller error unless V's prevails
        divides = (strength > MIN_DIVISOR) & (4 * K_bracket_size > tl.abs(R_dot_V))
        quotient = R_dot_U / tl.maximum(strength, MIN_DIVISOR)
        grad_beta = tl.where(divides, quotient, R_dot_V + K_bracket)
        if FUSED_SIGMOID:
            grad_beta *= strength * (1 - strength / BETA_SCALE)
        store_scalars(dbeta, grad_beta, first_token, tokens, head, HV, C)
        if dA_log is not None:
            tl.store(dA_log + chunk_head, tl.sum(A_log_terms))

    if grad_rows is not None:
        first_head = slot * HV + qk_head * (HV // H)
        rq, rk = load_factor(factors, first_head, RQ, C), load_factor(factors, first_head, RK, C)
        q = find_batch_row(q, first_token, T, Q_STRIDES)
        k = find_batch_row(k, first_token, T, K_STRIDES)
        _finish(
            grad_rows, dq, q, first_head * 2, rq, Q_dot_dQ, first_token, tokens, qk_head, Q_STRIDES,
            H, HV, K, BK, BD, C, L2_NORM,
        )  # fmt: skip
        _finish(
            grad_rows, dk, k, first_head * 2 + 1, rk, K_dot_dK, first_token, tokens, qk_head,
            K_STRIDES, H, HV, K, BK, BD, C, L2_NORM,
        )  # fmt: skip
