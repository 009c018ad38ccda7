"""Backward, last stage: the gradients of k, v, g and beta.

With S the state before the chunk, dS the gradient of the state after it, R from `reverse_scan.py`,
* elementwise, and W = tril(L_ij k_i.k_j, -1), for each value head

    dV = beta * R
    dK = e^{gamma - G} * (U dS^T) - e^G * (dV S^T) + scale (dP * L)^T Q + (D + D^T) K
    dP = tril(dO U^T),  D = -beta * tril(L * (R U^T), -1)
    dbeta = rowsum(R * V) - rowsum(e^G * K * (R S^T)) - rowsum(W * (R U^T)) = rowsum(R * U) / beta

for normalised q and k, of which `prepare.py` explains the notation. dg_t is the sum of gradient
times value over the factors that contain g_t:

    e^{G_i}           for i >= t
    e^{G_i - G_j}     for i >= t > j
    e^{gamma - G_j}   for t > j
    e^gamma

`query_gradients.py` computes the share of o. Then follow the gradients through the L2 norm, the
sigmoid and the gate.

A program takes a chunk and q/k head. It sums dK over the value heads in float32 and in order, so
that two runs are bit-equal. Reads q, k, v, g, `factors`, dO, U^T, R^T, the states, their gradients
and dG from o. Writes dk, dv, dg, dbeta, and the chunk's terms of dA_log and ddt_bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import (
    FLOOR,
    backpropagate_gate,
    backpropagate_norm,
    compute_log_decay,
    load_A_log,
)
from .chunk_buffers import (
    BETA,
    GATE_SUM,
    RK,
    RQ,
    load_factor,
    load_gamma,
    load_gate_sums,
    load_matrix,
    load_row_scales,
    multiply_by_scales,
)
from .indexing import COUNTS, locate_chunk
from .launch import ANY_ALIGNMENT
from .tiles import (
    clear_rows,
    clear_scalars,
    compute_decay_matrix,
    dot,
    dot_rounded,
    find_batch_row,
    load_input_rows,
    load_input_scalars,
    load_rows,
    load_state,
    mask_strictly_lower,
    select_last,
    store_rows,
    store_scalars,
)

MIN_DIVISOR = tl.constexpr(0.0625)
"""The kernel divides by beta only where beta is larger than this."""


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def key_gradients_kernel(
    q, k, v, g, factors, states, grad_states, U, R, row_scales, grad_o, dG_from_o, A_log, dt_bias,
    dk, dv, dg, dbeta, dA_log, ddt_bias, cu_seqlens,
    scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    L2_NORM: tl.constexpr, FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr,
    FUSED_SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr, Q_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, G_STRIDES: tl.constexpr,
):  # fmt: skip
    """dA_log and ddt_bias [slots, HV] take one term a chunk. The host sums them."""
    program = tl.program_id(0).to(tl.int64)
    slot, qk_head = program // H, program % H
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if VARLEN:  # tokens past the last sequence
        end = tl.load(cu_seqlens + N).to(tl.int64)
        if first_token + C > end:
            clear_rows(dk, first_token, end, T, qk_head, H, K, 0, C, BK)
            for head in range(qk_head * (HV // H), (qk_head + 1) * (HV // H)):
                clear_scalars(dg, first_token, end, T, head, HV, C)
                clear_scalars(dbeta, first_token, end, T, head, HV, C)
                for first_v in range(0, V, BV):
                    clear_rows(dv, first_token, end, T, head, HV, V, first_v, C, BV)
    if tokens <= 0:
        return
    dtype: tl.constexpr = q.dtype.element_ty
    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    v = find_batch_row(v, first_token, T, V_STRIDES)
    g = find_batch_row(g, first_token, T, G_STRIDES)
    valid = tl.arange(0, C) < tokens  # [C]
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    rq = load_factor(factors, slot * HV + qk_head * (HV // H), RQ, C)
    rk = load_factor(factors, slot * HV + qk_head * (HV // H), RK, C)
    dk_tile = tl.zeros([C, BK], tl.float32)
    dP_L_T_sum = tl.zeros([C, C], tl.float32)  # (dP * L)^T, summed over the value heads
    D_sum = tl.zeros([C, C], tl.float32)  # D, summed over the value heads
    for group in range(HV // H):
        head = qk_head * (HV // H) + group
        chunk_head = slot * HV + head
        G_rounded = load_factor(factors, chunk_head, GATE_SUM, C)
        strength = load_factor(factors, chunk_head, BETA, C)
        gamma = load_gamma(factors, chunk_head, C)

        # === through U = A (beta * (V - e^G * (K S))) ===
        R_U_T = tl.zeros([C, C], tl.float32)
        R_S_T = tl.zeros([C, BK], tl.float32)
        grad_beta = tl.zeros([C], tl.float32)
        for first_v in range(0, V, BV):
            R_tile = tl.trans(load_matrix(R, chunk_head, first_v, V, BV, C))  # [C, BV]
            R_S_T += dot(R_tile, load_state(states, chunk_head, first_v, K, V, BK, BV))
            R_U_T += dot(R_tile, load_matrix(U, chunk_head, first_v, V, BV, C))
            values = load_input_rows(v, first_token, tokens, head, V_STRIDES, V, first_v, C, BV)
            scales = load_row_scales(row_scales, chunk_head, first_v, V, BV, dtype)  # [BV]
            unscaled_R = R_tile.to(tl.float32) / scales[None, :]
            grad_beta += tl.sum(unscaled_R * values.to(tl.float32), axis=1)
            dv_tile = strength[:, None] * unscaled_R
            store_rows(dv, dv_tile, first_token, tokens, head, HV, V, first_v, C, BV)
        keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK)  # [C, K]
        R_S_T *= tl.exp(G_rounded)[:, None]  # e^G * (R S^T)
        R_dot_KS = rk * tl.sum(keys.to(tl.float32) * R_S_T, axis=1)  # rowsum(R * e^G * (K S))
        dk_tile -= strength[:, None] * R_S_T
        G = load_gate_sums(factors, chunk_head, C, dtype)
        L = compute_decay_matrix(G, C)
        R_dot_U = tl.sum(tl.where(row == column, R_U_T, 0.0), axis=1)  # the diagonal of R U^T
        R_U_T = mask_strictly_lower(R_U_T * L, C)
        D_sum -= strength[:, None] * R_U_T
        R_U_T *= rk[:, None] * rk[None, :] * dot(keys, tl.trans(keys))  # W * (R U^T)
        grad_beta -= R_dot_KS + tl.sum(R_U_T, axis=1)
        # rowsum(R * U) / beta has a smaller rounding error, since U is rounded only once
        grad_beta = tl.where(
            strength > MIN_DIVISOR, R_dot_U / tl.maximum(strength, MIN_DIVISOR), grad_beta
        )
        M_R_U_T = strength[:, None] * R_U_T  # M * (R U^T) = -dM * M
        dG = tl.load(dG_from_o + chunk_head * C + tl.arange(0, C)) - strength * R_dot_KS
        dG -= tl.sum(M_R_U_T, axis=1) - tl.sum(M_R_U_T, axis=0)

        # === through the state's update K^T (e^{gamma - G} * U), and P U in o ===
        U_dS_T = tl.zeros([C, BK], tl.float32)
        dP_T = tl.zeros([C, C], tl.float32)
        S_dot_dS = 0.0
        for first_v in range(0, V, BV):
            dS_T = load_state(grad_states, chunk_head, first_v, K, V, BK, BV)  # [BV, K]
            U_tile = tl.trans(load_matrix(U, chunk_head, first_v, V, BV, C))  # [C, BV]
            U_dS_T += dot(U_tile, dS_T)
            dO = load_rows(grad_o, first_token, tokens, head, HV, V, first_v, C, BV)  # [C, BV]
            dO = multiply_by_scales(dO, row_scales, chunk_head, first_v, V, BV)
            dP_T += dot(U_tile, tl.trans(dO))
            S_T = load_state(states, chunk_head, first_v, K, V, BK, BV).to(tl.float32)  # [BV, K]
            S_dot_dS += tl.sum(S_T * dS_T.to(tl.float32))
        U_dS_T *= tl.exp((select_last(G, C) - G).to(tl.float32))[:, None]  # e^{gamma-G} * (U dS^T)
        dk_tile += U_dS_T
        keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK)
        U_dot_KdS = rk * tl.sum(keys.to(tl.float32) * U_dS_T, axis=1)  # [C]
        exponents_T = (G[None, :] - G[:, None]).to(tl.float32)  # of L^T
        dP_L_T_sum += dP_T * tl.exp(tl.where(row <= column, exponents_T, -float("inf")))

        # === g and beta ===
        dg_tile = tl.cumsum(dG, axis=0, reverse=True)  # e^{G_i} and e^{G_i - G_j}
        # e^{gamma - G_j}: a masked sum, since a cumulative sum less its last term would cancel
        dg_tile += tl.sum(tl.where(row > column, U_dot_KdS[None, :], 0.0), axis=1)
        dg_tile += tl.exp(gamma) * S_dot_dS  # e^gamma
        raw = load_input_scalars(g, first_token, tokens, head, G_STRIDES, C)
        dg_tile = tl.where(valid, dg_tile, 0.0)
        if FUSED_GATE:
            if dt_bias is not None:
                raw += tl.load(dt_bias + head).to(tl.float32)
            A_log_value = load_A_log(A_log, head)
            log_decay = compute_log_decay(raw, A_log_value, LOWER_BOUND)
            dg_tile, terms = backpropagate_gate(dg_tile, raw, A_log_value, log_decay, LOWER_BOUND)
            if A_log is not None:
                tl.store(dA_log + chunk_head, tl.sum(terms))
            if dt_bias is not None:
                tl.store(ddt_bias + chunk_head, tl.sum(dg_tile))
        else:
            dg_tile = tl.where(raw <= FLOOR, 0.0, dg_tile)  # clamped by `prepare.py`
        if FUSED_SIGMOID:
            grad_beta *= strength * (1 - strength / BETA_SCALE)
        store_scalars(dg, dg_tile, first_token, tokens, head, HV, C)
        store_scalars(dbeta, grad_beta, first_token, tokens, head, HV, C)

    # === through P and M, summed over the value heads ===
    queries = load_input_rows(q, first_token, tokens, qk_head, Q_STRIDES, K, 0, C, BK)  # [C, K]
    dk_tile += dot_rounded(scale * dP_L_T_sum * rq[None, :], queries, dtype)
    keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK)
    D_plus_D_T = (D_sum + tl.trans(D_sum)) * rk[None, :]
    dk_tile += dot_rounded(D_plus_D_T, keys, dtype)
    if L2_NORM:
        dk_tile = backpropagate_norm(dk_tile, keys.to(tl.float32), rk)
    store_rows(dk, dk_tile, first_token, tokens, qk_head, H, K, 0, C, BK)
