"""Forward, stage 1: everything in a chunk that does not depend on the state.

    g by `activation.py`, beta = c sigmoid(beta_raw)                         where fused
    rq, rk = 1 / sqrt(sum x^2 + 1e-6) of the rows x of q and k               where fused, else 1
    G = cumsum(g) within the chunk, gamma = G_last, L_ij = exp(G_i - G_j) for i >= j
    M_ij = beta_i L_ij rk_i rk_j k_i.k_j for i > j,     A = (I + M)^-1
    P_ij = scale L_ij rq_i rk_j q_i.k_j for i >= j

A program takes a chunk and value head. It reads q, k [C, K] and g, beta [C], and writes `factors`
and `matrices` (see `chunk_buffers.py`).

q and k are not normalised in memory. Here and in later stages the norms scale the products of raw
rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import FLOOR, compute_log_decay, compute_reciprocal_norms, load_A_log
from .chunk_buffers import (
    BETA,
    GATE_SUM,
    GATE_SUM_RESIDUAL,
    KS_TO_E,
    NUM_MATRICES,
    QS_TO_O,
    RK,
    RQ,
    SCORES,
    U_TO_STATE,
    clear_saved,
    store_factor,
    store_inverse,
    store_matrix,
)
from .indexing import COUNTS, locate_chunk
from .inverse import invert_unit_lower
from .launch import ANY_ALIGNMENT
from .tiles import (
    compute_decay_matrix,
    dot,
    find_batch_row,
    load_input_rows,
    load_input_scalars,
    mask_strictly_lower,
    select_last,
)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def prepare_kernel(
    q, k, g, beta, A_log, dt_bias, factors, matrices, cu_seqlens,
    scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, L2_NORM: tl.constexpr, FUSED_GATE: tl.constexpr,
    LOWER_BOUND: tl.constexpr, FUSED_SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr,
    SAVE: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
    G_STRIDES: tl.constexpr, BETA_STRIDES: tl.constexpr,
):  # fmt: skip
    """SAVE: backward follows, so INVERSE is written too, and unused slots are zeroed."""
    chunk_head = tl.program_id(0).to(tl.int64)
    slot, head = chunk_head // HV, chunk_head % HV
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if tokens <= 0:
        if SAVE:
            clear_saved(factors, matrices, chunk_head, C)
        return
    valid = tl.arange(0, C) < tokens  # [C]
    dtype: tl.constexpr = k.dtype.element_ty

    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    g = find_batch_row(g, first_token, T, G_STRIDES)
    beta = find_batch_row(beta, first_token, T, BETA_STRIDES)

    # === gates ===
    log_decay = load_input_scalars(g, first_token, tokens, head, G_STRIDES, C)  # [C]
    if FUSED_GATE:
        if dt_bias is not None:
            log_decay += tl.load(dt_bias + head).to(tl.float32)
        log_decay = compute_log_decay(log_decay, load_A_log(A_log, head), LOWER_BOUND)
    # clamped so that sums keep their digits; tl.maximum would drop NaN
    log_decay = tl.where(log_decay < FLOOR, FLOOR, log_decay)
    log_decay = tl.where(valid, log_decay, 0.0)  # past the end G keeps its last value
    # float32 calls sum in float64: else G_i - G_j would be their largest rounding error
    sum_dtype: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32
    G = tl.cumsum(log_decay.to(sum_dtype), axis=0)  # [C]
    gamma = select_last(G, C)
    strength = load_input_scalars(beta, first_token, tokens, head, BETA_STRIDES, C)  # beta, [C]
    if FUSED_SIGMOID:
        strength = BETA_SCALE * tl.sigmoid(strength)
    strength = tl.where(valid, strength, 0.0)

    # === matrices ===
    qk_head = head // (HV // H)
    queries = load_input_rows(q, first_token, tokens, qk_head, Q_STRIDES, K, 0, C, BK)  # [C, K]
    keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK)  # [C, K]
    keys_T = tl.trans(keys)
    L = compute_decay_matrix(G, C)  # [C, C]
    gamma_minus_G = (gamma - G).to(tl.float32)
    G_residual = (G - G.to(tl.float32)).to(tl.float32)
    G = G.to(tl.float32)
    P = L * dot(queries, keys_T)  # [C, C], without scale and norms
    M = L * dot(keys, keys_T)  # [C, C], without beta and norms
    rq, rk = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    if L2_NORM:
        rq, rk = compute_reciprocal_norms(queries), compute_reciprocal_norms(keys)
        P *= rk[None, :]
        M *= rk[None, :]
    P = (scale * rq)[:, None] * P
    store_matrix(matrices, P, chunk_head * NUM_MATRICES + SCORES, 0, C, C, C)
    A = invert_unit_lower(mask_strictly_lower((strength * rk)[:, None] * M, C), C, dtype)
    store_inverse(matrices, A, A * strength[None, :], chunk_head, C, SAVE)

    # === factors ===
    store_factor(factors, G, chunk_head, GATE_SUM, C)
    store_factor(factors, strength, chunk_head, BETA, C)
    store_factor(factors, rk * tl.exp(gamma_minus_G), chunk_head, U_TO_STATE, C)
    store_factor(factors, scale * rq * tl.exp(G), chunk_head, QS_TO_O, C)
    store_factor(factors, rq, chunk_head, RQ, C)
    store_factor(factors, rk, chunk_head, RK, C)
    store_factor(factors, rk * tl.exp(G), chunk_head, KS_TO_E, C)
    store_factor(factors, G_residual, chunk_head, GATE_SUM_RESIDUAL, C)
