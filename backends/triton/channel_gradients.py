"""Backward, last stage with a decay per channel: the gradients of q, k, g and beta.

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
what remains. Then follow the gradients through the L2 norm, the sigmoid and the gate.

A program takes a chunk and q/k head, value heads in turn, and BD channels at a time. It sums dQ and
dK over the value heads in float32 and in order, so that two runs are bit-equal. Reads q, k, g,
`factors`, dO, U^T, R^T, the states, their gradients and what `matrix_gradients.py` leaves. Writes
dq, dk, dg, dbeta, and the chunk's terms of dA_log and ddt_bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import FLOOR, backpropagate_gate, exp_flushed, load_A_log
from .channel_decay import NUMBERS, load_channel_gates
from .channel_pair_gradients import add_pairs
from .chunk_buffers import (
    BETA,
    RK,
    RQ,
    load_factor,
    load_matrix,
    multiply_by_scales,
)
from .indexing import COUNTS, locate_chunk
from .key_gradients import MIN_DIVISOR
from .tiles import (
    clear_rows,
    clear_scalars,
    dot,
    dot_split,
    find_batch_row,
    load_input_rows,
    load_rows,
    load_state_columns,
    store_rows,
    store_scalars,
)


@triton.jit
def sum_gates(log_decay, dtype: tl.constexpr):
    """G of log_decay [C, BD], precise enough for differences: in float64 for float32 calls."""
    return tl.cumsum(log_decay.to(tl.float64 if dtype == tl.float32 else tl.float32), axis=0)


@triton.jit
def sum_from_tokens(x, C: tl.constexpr, dtype: tl.constexpr):
    """The sum of the rows of x [C, BD] from each token on, as a product: the compiler gives scans
    other layouts, and computes what depends on them once for each."""
    from_token = tl.where(tl.arange(0, C)[:, None] <= tl.arange(0, C)[None, :], 1.0, 0.0)
    return dot(from_token, x) if dtype == tl.float32 else dot_split(from_token, x)


@triton.jit
def sum_entries(sums, index, first_channel, C: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """Pointers to BD channels of a tile [C, BK] of `sums`."""
    r, c = tl.arange(0, C)[:, None], first_channel + tl.arange(0, BD)[None, :]
    return sums + index * (C * BK) + (r * BK + c)


@triton.jit
def add_to_sums(
    sums, dx, x, index, first_channel, group,
    C: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add dx [C, BD] of a value head to those of the heads before. Return rowsum(x * the sum)."""
    entries = sum_entries(sums, index, first_channel, C, BK, BD)
    if group > 0:
        tl.debug_barrier()  # other threads may have stored it
        dx += tl.load(entries)
    tl.store(entries, dx)
    return tl.sum(x * dx, axis=1)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=NUMBERS)
def channel_gradients_kernel(
    q, k, g, factors, states, grad_states, U, R, row_scales, grad_o, grad_matrices, products,
    A_log, dt_bias, sums, dq, dk, dg, dbeta, dA_log, ddt_bias, cu_seqlens,
    scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    L2_NORM: tl.constexpr, FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr,
    FUSED_SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr, Q_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr, G_STRIDES: tl.constexpr,
):  # fmt: skip
    """dA_log [slots, HV] and ddt_bias [slots, HV, K] take one term a chunk. The host sums them.

    sums [slots, H, 2, C, BK] holds dQ and dK in float32 until all value heads and channels are
    done. It is needed, and given, with grouped heads or the L2 norm.
    """
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
                    clear_rows(dg, first_token, end, T, head, HV, K, first_channel, C, BD)
            for head in range(qk_head * (HV // H), (qk_head + 1) * (HV // H)):
                clear_scalars(dbeta, first_token, end, T, head, HV, C)
    if tokens <= 0:
        return
    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    g = find_batch_row(g, first_token, T, G_STRIDES)
    dtype: tl.constexpr = q.dtype.element_ty
    BK: tl.constexpr = (K + BD - 1) // BD * BD
    row = tl.arange(0, C)[:, None]
    rq = load_factor(factors, slot * HV + qk_head * (HV // H), RQ, C)
    rk = load_factor(factors, slot * HV + qk_head * (HV // H), RK, C)
    Q_dot_dQ, K_dot_dK = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for group in range(HV // H):
        head = qk_head * (HV // H) + group
        chunk_head = slot * HV + head
        strength = load_factor(factors, chunk_head, BETA, C)  # beta, [C]

        of_head = products + chunk_head * (3 * C) + tl.arange(0, C)
        R_dot_V, R_dot_U = tl.load(of_head), tl.load(of_head + C)
        dP_diagonal = tl.load(of_head + 2 * C)
        dP = load_matrix(grad_matrices, chunk_head * 2, 0, C, C, C)  # above the diagonal dP^T
        F = load_matrix(grad_matrices, chunk_head * 2 + 1, 0, C, C, C)  # there (beta F)^T
        K_bracket, K_bracket_size = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        dA_log_term = 0.0
        for first_channel in range(0, K, BD):
            _, log_decay = load_channel_gates(
                g, A_log, dt_bias, first_token, tokens, head, first_channel, G_STRIDES, K, C, BD,
                FUSED_GATE, LOWER_BOUND,
            )  # fmt: skip
            G = sum_gates(log_decay, dtype)  # [C, BD]
            gamma = tl.sum(tl.where(row == C - 1, G, 0.0), axis=0)  # [BD]

            # === through the states ===
            dO_S_T, R_S_T = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
            U_dS_T, S_dot_dS = tl.zeros([C, BD], tl.float32), tl.zeros([BD], tl.float32)
            for first_v in range(0, V, BV):
                S_T = load_state_columns(states, chunk_head, first_v, first_channel, K, V, BV, BD)
                dO = load_rows(grad_o, first_token, tokens, head, HV, V, first_v, C, BV)
                dO = multiply_by_scales(dO, row_scales, chunk_head, first_v, V, BV)
                dO_S_T += dot(dO, S_T)
                R_S_T += dot(tl.trans(load_matrix(R, chunk_head, first_v, V, BV, C).to(dtype)), S_T)
                dS_T = load_state_columns(
                    grad_states, chunk_head, first_v, first_channel, K, V, BV, BD
                )
                U_dS_T += dot(tl.trans(load_matrix(U, chunk_head, first_v, V, BV, C)), dS_T)
                S_dot_dS += tl.sum(S_T.to(tl.float32) * dS_T.to(tl.float32), axis=0)
            raw_q = load_input_rows(
                q, first_token, tokens, qk_head, Q_STRIDES, K, first_channel, C, BD
            )
            raw_k = load_input_rows(
                k, first_token, tokens, qk_head, K_STRIDES, K, first_channel, C, BD
            )
            queries, keys = rq[:, None] * raw_q.to(tl.float32), rk[:, None] * raw_k.to(tl.float32)
            dQ = scale * exp_flushed(G.to(tl.float32)) * dO_S_T
            dK_bracket = -exp_flushed(G.to(tl.float32)) * R_S_T
            dK_out = exp_flushed((gamma[None, :] - G).to(tl.float32)) * U_dS_T
            dK = strength[:, None] * dK_bracket + dK_out
            K_dK_out = tl.where(row + 1 < tokens, keys * dK_out, 0.0)
            K_dK_out = tl.where(row == C - 1, 0.0, K_dK_out)
            from_start = exp_flushed(gamma.to(tl.float32)) * S_dot_dS + tl.sum(
                K_dK_out, axis=0
            )  # [BD]
            terms = queries * dQ - K_dK_out + strength[:, None] * keys * dK_bracket
            product = tl.sum(keys * dK_bracket, axis=1)
            K_bracket += product
            K_bracket_size += tl.abs(product)

            # === through pairs ===
            dQ, dK, terms, product = add_pairs(
                dQ, dK, terms, queries, keys, strength, dP, F, G, C, BD, dtype
            )
            K_bracket += product
            K_bracket_size += tl.abs(product)
            queries, keys = rq[:, None] * raw_q.to(tl.float32), rk[:, None] * raw_k.to(tl.float32)
            dQ += dP_diagonal[:, None] * keys
            dK += dP_diagonal[:, None] * queries

            # === g ===
            raw, log_decay = load_channel_gates(  # again, to hold fewer registers until here
                g, A_log, dt_bias, first_token, tokens, head, first_channel, G_STRIDES, K, C, BD,
                FUSED_GATE, LOWER_BOUND,
            )  # fmt: skip
            dg_tile = from_start[None, :] + sum_from_tokens(terms, C, dtype)
            dg_tile = tl.where(row < tokens, dg_tile, 0.0)
            if FUSED_GATE:
                A_log_value = load_A_log(A_log, head)
                dg_tile, A_log_terms = backpropagate_gate(
                    dg_tile, raw, A_log_value, log_decay, LOWER_BOUND
                )
                dA_log_term += tl.sum(A_log_terms)
                if dt_bias is not None:
                    c = first_channel + tl.arange(0, BD)
                    tl.store(ddt_bias + chunk_head * K + c, tl.sum(dg_tile, axis=0), mask=c < K)
            else:
                dg_tile = tl.where(log_decay <= FLOOR, 0.0, dg_tile)  # clamped
            store_rows(dg, dg_tile, first_token, tokens, head, HV, K, first_channel, C, BD)

            # === q and k, over the value heads ===
            if sums is None:
                store_rows(dq, dQ, first_token, tokens, qk_head, H, K, first_channel, C, BD)
                store_rows(dk, dK, first_token, tokens, qk_head, H, K, first_channel, C, BD)
            else:
                last = group == HV // H - 1
                product = add_to_sums(
                    sums, dQ, queries, program * 2, first_channel, group, C, BK, BD
                )
                Q_dot_dQ = tl.where(last, Q_dot_dQ + product, 0.0)
                product = add_to_sums(
                    sums, dK, keys, program * 2 + 1, first_channel, group, C, BK, BD
                )
                K_dot_dK = tl.where(last, K_dot_dK + product, 0.0)

        # U is rounded once, so that its product has the smaller error unless V's prevails
        divides = (strength > MIN_DIVISOR) & (4 * K_bracket_size > tl.abs(R_dot_V))
        quotient = R_dot_U / tl.maximum(strength, MIN_DIVISOR)
        grad_beta = tl.where(divides, quotient, R_dot_V + K_bracket)
        if FUSED_SIGMOID:
            grad_beta *= strength * (1 - strength / BETA_SCALE)
        store_scalars(dbeta, grad_beta, first_token, tokens, head, HV, C)
        if dA_log is not None:
            tl.store(dA_log + chunk_head, dA_log_term)

    if sums is not None:
        tl.debug_barrier()
        for first_channel in range(0, K, BD):
            dQ = tl.load(sum_entries(sums, program * 2, first_channel, C, BK, BD))
            dK = tl.load(sum_entries(sums, program * 2 + 1, first_channel, C, BK, BD))
            if L2_NORM:
                queries = load_input_rows(
                    q, first_token, tokens, qk_head, Q_STRIDES, K, first_channel, C, BD
                )
                keys = load_input_rows(
                    k, first_token, tokens, qk_head, K_STRIDES, K, first_channel, C, BD
                )
                queries = rq[:, None] * queries.to(tl.float32)
                keys = rk[:, None] * keys.to(tl.float32)
                dQ = rq[:, None] * (dQ - queries * Q_dot_dQ[:, None])
                dK = rk[:, None] * (dK - keys * K_dot_dK[:, None])
            store_rows(dq, dQ, first_token, tokens, qk_head, H, K, first_channel, C, BD)
            store_rows(dk, dK, first_token, tokens, qk_head, H, K, first_channel, C, BD)
