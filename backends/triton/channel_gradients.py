"""Backward, last stage with a decay per channel: the gradients of q, k, v, g and beta.

With S the state before the chunk, dS the gradient of the state after it, dU from `reverse_scan.py`,
a = e^G, z = e^{gamma - G}, * elementwise, and pairs i > j with decays D_ij (`channel_decay.py`),
for each value head

    R = A^T dU,   dV = beta * R,   dP = scale tril(dO U^T),   F = -tril(R U^T, -1)
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
dK over the value heads in float32 and in order, so that two runs are bit-equal. Reads q, k, v, g,
`factors`, A, dO, U^T, dU^T, the states and their gradients. Overwrites dU^T with R^T. Writes dq,
dk, dv, dg, dbeta, and the chunk's terms of dA_log and ddt_bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import FLOOR, backpropagate_gate, load_A_log
from .channel_decay import (
    LEVELS,
    dot_decayed,
    level_factors,
    level_pairs,
    load_channel_gates,
    round_decayed,
    sum_gates,
)
from .chunk_buffers import (
    BETA,
    INVERSE,
    NUM_MATRICES,
    RK,
    RQ,
    load_factor,
    load_matrix,
    load_row_scales,
    multiply_by_scales,
    store_matrix,
)
from .indexing import locate_chunk
from .key_gradients import MIN_DIVISOR
from .tiles import (
    dot,
    dot_split,
    load_rows,
    load_state_columns,
    store_rows,
    store_rows_transposed,
    store_scalars,
)


@triton.jit
def sum_from_tokens(x, C: tl.constexpr, dtype: tl.constexpr):
    """The sum of the rows of x [C, BD] from each token on, as a product: the compiler gives scans
    other layouts, and computes what depends on them once for each."""
    from_token = tl.where(tl.arange(0, C)[:, None] <= tl.arange(0, C)[None, :], 1.0, 0.0)
    return dot(from_token, x) if dtype == tl.float32 else dot_split(from_token, x)


@triton.jit
def matrix_gradients_kernel(
    v, factors, matrices, U, R, row_scales, grad_o, dv, grad_matrices, products, cu_seqlens,
    scale, N, T, chunks_per_sequence,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The first lines of the equations: R^T in place of dU^T, dv, `grad_matrices` and `products`.
    A program takes a chunk and value head."""
    chunk_head = tl.program_id(0).to(tl.int64)
    slot, head = chunk_head // HV, chunk_head % HV
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if tokens <= 0:
        return
    dtype: tl.constexpr = v.dtype.element_ty
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    strength = load_factor(factors, chunk_head, BETA, C)  # beta, [C]
    A = load_matrix(matrices, chunk_head * NUM_MATRICES + INVERSE, 0, C, C, C)
    R_dot_V, R_dot_U = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for first_v in range(0, V, BV):
        dU_T = load_matrix(R, chunk_head, first_v, V, BV, C)  # [BV, C]
        if dtype == tl.float16:
            R_T = dot_split(dU_T, A.to(tl.float32))
        else:
            R_T = dot(dU_T, A)
        store_matrix(R, R_T, chunk_head, first_v, V, BV, C)
        U_T = load_matrix(U, chunk_head, first_v, V, BV, C).to(tl.float32)
        R_dot_U += tl.sum(R_T * U_T, axis=0)
        R_T /= load_row_scales(row_scales, chunk_head, first_v, V, BV, dtype)[:, None]
        values = load_rows(v, first_token, tokens, head, HV, V, first_v, C, BV)
        R_dot_V += tl.sum(R_T * tl.trans(values).to(tl.float32), axis=0)
        dv_T = strength[None, :] * R_T
        store_rows_transposed(dv, dv_T, first_token, tokens, head, HV, V, first_v, C, BV)
    tl.debug_barrier()  # other threads load R^T

    R_U_T, U_R_T = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dO_U_T, U_dO_T = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for first_v in range(0, V, BV):
        R_T = load_matrix(R, chunk_head, first_v, V, BV, C).to(dtype)  # [BV, C]
        U_T = load_matrix(U, chunk_head, first_v, V, BV, C)  # [BV, C]
        dO = load_rows(grad_o, first_token, tokens, head, HV, V, first_v, C, BV)  # [C, BV]
        dO = multiply_by_scales(dO, row_scales, chunk_head, first_v, V, BV)
        R_U_T += dot(tl.trans(R_T), U_T)
        U_R_T += dot(tl.trans(U_T), R_T)
        dO_U_T += dot(dO, U_T)
        U_dO_T += dot(tl.trans(U_T), tl.trans(dO))
    dP_diagonal = scale * tl.sum(tl.where(row == column, dO_U_T, 0.0), axis=1)  # [C]
    dP = scale * tl.where(row > column, dO_U_T, U_dO_T)
    F = -tl.where(row > column, R_U_T, strength[None, :] * U_R_T)
    store_matrix(grad_matrices, dP, chunk_head * 2, 0, C, C, C)
    store_matrix(grad_matrices, F, chunk_head * 2 + 1, 0, C, C, C)
    at = products + chunk_head * (3 * C) + tl.arange(0, C)
    tl.store(at, R_dot_V)
    tl.store(at + C, R_dot_U)
    tl.store(at + 2 * C, dP_diagonal)


@triton.jit
def channel_gradients_kernel(
    q, k, g, factors, states, grad_states, U, R, row_scales, grad_o, grad_matrices, products,
    A_log, dt_bias, sums, dq, dk, dg, dbeta, dA_log, ddt_bias, cu_seqlens,
    scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    L2_NORM: tl.constexpr, FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr,
    FUSED_SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr,
):  # fmt: skip
    """dA_log [slots, HV] and ddt_bias [slots, HV, K] take one term a chunk. The host sums them.

    sums [slots, H, 2, C, BK] holds dQ and dK in float32 until all value heads and channels are
    done. It is needed, and given, with grouped heads or the L2 norm.
    """
    program = tl.program_id(0).to(tl.int64)
    slot, qk_head = program // H, program % H
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if tokens <= 0:
        return
    dtype: tl.constexpr = q.dtype.element_ty
    BK: tl.constexpr = (K + BD - 1) // BD * BD
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
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
                g, A_log, dt_bias, first_token, tokens, head, first_channel, HV, K, C, BD,
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
            raw_q = load_rows(q, first_token, tokens, qk_head, H, K, first_channel, C, BD)
            raw_k = load_rows(k, first_token, tokens, qk_head, H, K, first_channel, C, BD)
            queries, keys = rq[:, None] * raw_q.to(tl.float32), rk[:, None] * raw_k.to(tl.float32)
            dQ = scale * tl.exp(G.to(tl.float32)) * dO_S_T
            dK_bracket = -tl.exp(G.to(tl.float32)) * R_S_T
            dK_out = tl.exp((gamma[None, :] - G).to(tl.float32)) * U_dS_T
            dK = strength[:, None] * dK_bracket + dK_out
            K_dK_out = tl.where(row + 1 < tokens, keys * dK_out, 0.0)
            K_dK_out = tl.where(row == C - 1, 0.0, K_dK_out)
            from_start = tl.exp(gamma.to(tl.float32)) * S_dot_dS + tl.sum(K_dK_out, axis=0)  # [BD]
            terms = queries * dQ - K_dK_out + strength[:, None] * keys * dK_bracket
            product = tl.sum(keys * dK_bracket, axis=1)
            K_bracket += product
            K_bracket_size += tl.abs(product)

            # === through pairs ===
            for level in range(LEVELS):
                f = level_factors(G, level, C, BD)
                q_f = round_decayed(rq[:, None] * raw_q.to(tl.float32) * f, dtype)
                k_f = round_decayed(rk[:, None] * raw_k.to(tl.float32) * f, dtype)
                pairs = level_pairs(level, C)
                right = (row >> (LEVELS - 1 - level)) & 1 == 1  # tokens in right halves
                dQ_f = dot_decayed(tl.where(pairs & (row > column), dP, 0.0), k_f, dtype)
                dK_f = dot_decayed(tl.where(pairs & (row < column), dP, 0.0), q_f, dtype)
                dK_f += dot_decayed(tl.where(pairs, F, 0.0), k_f, dtype)
                dQ += f * dQ_f
                dK += tl.where(right, strength[:, None], 1.0) * f * dK_f
                terms += q_f.to(tl.float32) * dQ_f
                K_dK_f = k_f.to(tl.float32) * dK_f
                terms += tl.where(right, strength[:, None], -1.0) * K_dK_f
                product = tl.sum(tl.where(right, K_dK_f, 0.0), axis=1)
                K_bracket += product
                K_bracket_size += tl.abs(product)
            queries, keys = rq[:, None] * raw_q.to(tl.float32), rk[:, None] * raw_k.to(tl.float32)
            dQ += dP_diagonal[:, None] * keys
            dK += dP_diagonal[:, None] * queries

            # === g ===
            raw, log_decay = load_channel_gates(  # again, to hold fewer registers until here
                g, A_log, dt_bias, first_token, tokens, head, first_channel, HV, K, C, BD,
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
                at = sums + program * (2 * C * BK) + row * BK + first_channel
                at += tl.arange(0, BD)[None, :]
                if group > 0:
                    dQ += tl.load(at)
                    dK += tl.load(at + C * BK)
                tl.store(at, dQ)
                tl.store(at + C * BK, dK)
                if group == HV // H - 1:
                    Q_dot_dQ += tl.sum(queries * dQ, axis=1)
                    K_dot_dK += tl.sum(keys * dK, axis=1)

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
            at = sums + program * (2 * C * BK) + row * BK + first_channel
            at += tl.arange(0, BD)[None, :]
            dQ, dK = tl.load(at), tl.load(at + C * BK)
            if L2_NORM:
                queries = load_rows(q, first_token, tokens, qk_head, H, K, first_channel, C, BD)
                keys = load_rows(k, first_token, tokens, qk_head, H, K, first_channel, C, BD)
                queries = rq[:, None] * queries.to(tl.float32)
                keys = rk[:, None] * keys.to(tl.float32)
                dQ = rq[:, None] * (dQ - queries * Q_dot_dQ[:, None])
                dK = rk[:, None] * (dK - keys * K_dot_dK[:, None])
            store_rows(dq, dQ, first_token, tokens, qk_head, H, K, first_channel, C, BD)
            store_rows(dk, dK, first_token, tokens, qk_head, H, K, first_channel, C, BD)
