"""Backward, last but one stage with a decay per channel: the gradients of q, k and g.

With S the state before the chunk, dS the gradient of the state after it, R, dP and F from
`matrix_gradients.py`, a = e^G, z = e^{gamma - G}, * elementwise, and pairs i > j with decays D_ij
(`channel_decay.py`), for each value head

    dQ_i = scale a_i * (dO S^T)_i + sum_j dP_ij D_ij * K_j
    dK_i = beta_i (-a_i * (R S^T)_i + sum_j F_ij D_ij * K_j)
           + z_i * (U dS^T)_i + sum_j D_ji * (dP_ji Q_j + beta_j F_ji K_j)
    dbeta = rowsum(R * V) + rowsum(K * the bracket of dK) = rowsum(R * U) / beta

for normalised q and k, of which `prepare.py` explains the notation. Sums over j include j = i, with
D = 1, in those with dP. dg_t is the sum of gradient times value over the factors that contain g_t:
a_i for i >= t, D_ij for i >= t > j, z_j for j < t, and e^gamma. Sums of pairs over i >= t minus
those over j >= t leave these, if both have the same products: so they use rounded operands. What
contains no g at all, pairs i = j and z of the last token, stays out: it may be much larger than
what remains. Then follows the gradient through the gate.

A program takes a chunk, a value head and BD channels. What sums over channels or value heads is
left to `norm_gradients.py`. Reads q, k, g, `factors`, dO, U^T, R^T, the states, their gradients and
what `matrix_gradients.py` and `decay_rows_kernel` leave. Writes dg, the chunk's terms of ddt_bias,
`row_sums`, and dq and dk or, for `norm_gradients.py`, dQ and dK.

There is no loop over channels or heads: the compiler would keep in registers what does not change
in it, and spill for that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import FLOOR, backpropagate_gate, exp2_flushed, load_A_log
from .channel_decay import NUMBERS, load_channel_gates, split
from .channel_pair_gradients import add_pairs
from .chunk_buffers import (
    BETA,
    RK,
    RQ,
    load_factor,
    load_matrix,
    multiply_by_scales,
)
from .gate_buffers import FROM_TOKEN, PREFIX_SUMS, SUFFIX_SUMS, part_entries, sum_by
from .indexing import COUNTS, locate_chunk
from .norm_gradients import (
    A_LOG_TERMS,
    K_DOT_DK,
    Q_DOT_DQ,
    THROUGH_PAIRS,
    THROUGH_STATES,
    row_sum_entries,
)
from .tiles import (
    clear_rows,
    dot,
    find_batch_row,
    load_input_rows,
    load_rows,
    load_state_columns,
    row_entries,
    store_rows,
)


@triton.jit
def sum_from_tokens(selectors, x, C: tl.constexpr, dtype: tl.constexpr):
    """The sum of the rows of x [C, BD] from each token on."""
    high, low = split(x, dtype, PAIRED=True)
    return sum_by(selectors, FROM_TOKEN, high, low, C, dtype)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=NUMBERS)
def channel_gradients_kernel(
    q, k, g, factors, selectors, gate_parts, channel_decays, states, grad_states, U, R, row_scales,
    grad_o, grad_matrices, products, A_log, dt_bias, grad_rows, row_sums, dq, dk, dg, ddt_bias,
    cu_seqlens,
    scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, WEAK: tl.constexpr,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, G_STRIDES: tl.constexpr,
):  # fmt: skip
    """ddt_bias [slots, HV, K] takes one term a chunk. The host sums them.

    grad_rows [slots, HV, 2, C, BK] takes dQ and dK in float32. It is needed, and given, with
    grouped heads or the L2 norm.
    """
    tile = tl.program_id(0).to(tl.int64)
    TILES: tl.constexpr = (K + BD - 1) // BD
    first_channel, chunk_head = (tile % TILES).to(tl.int32) * BD, tile // TILES
    slot, head = chunk_head // HV, chunk_head % HV
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if VARLEN:  # tokens past the last sequence
        end = tl.load(cu_seqlens + N).to(tl.int64)
        if first_token + C > end:
            clear_rows(dg, first_token, end, T, head, HV, K, first_channel, C, BD)
    if tokens <= 0:
        return
    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    g = find_batch_row(g, first_token, T, G_STRIDES)
    dtype: tl.constexpr = q.dtype.element_ty
    row = tl.arange(0, C)[:, None]
    qk_head = head // (HV // H)
    rq = load_factor(factors, chunk_head, RQ, C)
    rk = load_factor(factors, chunk_head, RK, C)
    strength = load_factor(factors, chunk_head, BETA, C)  # beta, [C]

    # === through the states ===
    raw_q = load_input_rows(q, first_token, tokens, qk_head, Q_STRIDES, K, first_channel, C, BD)
    raw_k = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, first_channel, C, BD)
    first, second = part_entries(gate_parts, chunk_head, first_channel, C, BK, BD, dtype)
    high, low = tl.load(first), tl.load(second)
    dO_S_T, R_S_T = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
    U_dS_T, S_dot_dS = tl.zeros([C, BD], tl.float32), tl.zeros([BD], tl.float32)
    for first_v in range(0, V, BV):
        S_T = load_state_columns(states, chunk_head, first_v, first_channel, K, V, BV, BD)
        dO = load_rows(grad_o, first_token, tokens, head, HV, V, first_v, C, BV)
        dO = multiply_by_scales(dO, row_scales, chunk_head, first_v, V, BV)
        dO_S_T += dot(dO, S_T)
        R_S_T += dot(tl.trans(load_matrix(R, chunk_head, first_v, V, BV, C).to(dtype)), S_T)
        dS_T = load_state_columns(grad_states, chunk_head, first_v, first_channel, K, V, BV, BD)
        U_dS_T += dot(tl.trans(load_matrix(U, chunk_head, first_v, V, BV, C)), dS_T)
        S_dot_dS += tl.sum(S_T.to(tl.float32) * dS_T.to(tl.float32), axis=0)
    queries, keys = rq[:, None] * raw_q.to(tl.float32), rk[:, None] * raw_k.to(tl.float32)
    decay = exp2_flushed(sum_by(selectors, PREFIX_SUMS, high, low, C, dtype))
    dQ = scale * decay * dO_S_T
    dK_bracket = -decay * R_S_T
    dK_out = exp2_flushed(sum_by(selectors, SUFFIX_SUMS, high, low, C, dtype)) * U_dS_T
    dK = strength[:, None] * dK_bracket + dK_out
    K_dK_out = tl.where((row + 1 < tokens) & (row < C - 1), keys * dK_out, 0.0)
    c = first_channel + tl.arange(0, BD)
    from_start = tl.load(channel_decays + chunk_head * BK + c) * S_dot_dS
    from_start += tl.sum(K_dK_out, axis=0)  # [BD]
    K_dK_bracket = keys * dK_bracket
    terms = queries * dQ - K_dK_out + strength[:, None] * K_dK_bracket
    through_states = tl.sum(K_dK_bracket, axis=1)
    tl.store(row_sum_entries(row_sums, tile, THROUGH_STATES, C), through_states)

    # === through pairs ===
    dQ, dK, terms, through_pairs = add_pairs(
        dQ, dK, terms, queries, keys, strength, grad_matrices, selectors, high, low,
        chunk_head, C, WEAK, dtype,
    )  # fmt: skip
    tl.store(row_sum_entries(row_sums, tile, THROUGH_PAIRS, C), through_pairs)
    dP_diagonal = tl.load(products + chunk_head * (3 * C) + 2 * C + tl.arange(0, C))
    dQ += dP_diagonal[:, None] * keys
    dK += dP_diagonal[:, None] * queries

    # === q and k ===
    if grad_rows is None:
        store_rows(dq, dQ, first_token, tokens, qk_head, H, K, first_channel, C, BD)
        store_rows(dk, dK, first_token, tokens, qk_head, H, K, first_channel, C, BD)
    else:
        tl.store(row_entries(grad_rows, chunk_head * 2, first_channel, C, BK, BD), dQ)
        tl.store(row_entries(grad_rows, chunk_head * 2 + 1, first_channel, C, BK, BD), dK)
        tl.store(row_sum_entries(row_sums, tile, Q_DOT_DQ, C), tl.sum(queries * dQ, axis=1))
        tl.store(row_sum_entries(row_sums, tile, K_DOT_DK, C), tl.sum(keys * dK, axis=1))

    # === g ===
    dg_tile = from_start[None, :] + sum_from_tokens(selectors, terms, C, dtype)
    dg_tile = tl.where(row < tokens, dg_tile, 0.0)
    raw, log_decay = load_channel_gates(
        g, A_log, dt_bias, first_token, tokens, head, first_channel, G_STRIDES, K, C, BD,
        FUSED_GATE, LOWER_BOUND, dg_tile,
    )  # fmt: skip
    if FUSED_GATE:
        dg_tile, terms = backpropagate_gate(
            dg_tile, raw, load_A_log(A_log, head), log_decay, LOWER_BOUND
        )
        tl.store(row_sum_entries(row_sums, tile, A_LOG_TERMS, C), tl.sum(terms, axis=1))
        if dt_bias is not None:
            c = first_channel + tl.arange(0, BD)
            tl.store(ddt_bias + chunk_head * K + c, tl.sum(dg_tile, axis=0), mask=c < K)
    else:
        dg_tile = tl.where(log_decay <= FLOOR, 0.0, dg_tile)  # clamped
    store_rows(dg, dg_tile, first_token, tokens, head, HV, K, first_channel, C, BD)
