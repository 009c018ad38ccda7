"""Forward, stages 1 and 2 with a decay per channel: everything in a chunk that does not depend on
the state. Backward runs the second again, since its results take too much memory to be saved.

    M_ij = beta_i sum_c k_ic k_jc D_ijc for i > j,     A = (I + M)^-1
    P_ij = scale sum_c q_ic k_jc D_ijc for i >= j
    W = A diag(beta) (e^G * K),   Q_in = scale e^G * Q,   K_out = e^{gamma - G} * K

for normalised q and k; `channel_decay.py` explains D, `prepare.py` the rest. With them the scan is

    U = A beta V - W S,   O = Q_in S + P U,   S <- e^gamma * S + K_out^T U

where e^gamma scales the rows of S. The products with S and U need one matrix fewer in a row than
`scan.py` has for a decay per head.

A program takes a chunk and value head. Both kernels read q, k and g [C, K]. The first one also
reads beta [C], and writes `factors` and `matrices`. The second one reads those, and writes
`decayed_rows`, their scales and `channel_decays` (see `chunk_buffers.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import EPS
from .channel_decay import (
    LEVELS,
    NUMBERS,
    dot_decayed,
    level_factors,
    level_pairs,
    load_channel_gates,
    round_decayed,
    sum_gates,
)
from .chunk_buffers import (
    A_BETA,
    BETA,
    GATE_SUM,
    GATE_SUM_RESIDUAL,
    INVERSE,
    K_OUT,
    KS_TO_E,
    NUM_DECAYED_ROWS,
    NUM_MATRICES,
    Q_IN,
    QS_TO_O,
    RK,
    RQ,
    SCORES,
    U_TO_STATE,
    W,
    clear_saved,
    load_factor,
    load_matrix,
    store_factor,
    store_matrix,
)
from .indexing import COUNTS, locate_chunk
from .inverse import invert_unit_lower
from .tiles import (
    find_batch_row,
    load_input_rows,
    load_input_scalars,
    mask_strictly_lower,
    round_rows,
)


@triton.jit
def store_decayed_rows(
    value, which: tl.constexpr, factor: tl.constexpr, decayed_rows, factors, chunk_head,
    C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store value [C, BK] over its scales as rows number `which`, and the scales as a factor."""
    rounded, scales = round_rows(value, decayed_rows.dtype.element_ty)
    store_matrix(decayed_rows, rounded, chunk_head * NUM_DECAYED_ROWS + which, 0, C, C, BK)
    scales = tl.sum(tl.full([C, 1], 1.0, tl.float32) * scales, axis=1)
    store_factor(factors, scales, chunk_head, factor, C)


@triton.jit
def load_reciprocal_norms(
    x, first_token, tokens, head, STRIDES: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(sum x^2 + eps) of the rows of a chunk, [C], from tiles of BD columns."""
    squares = tl.zeros([C], tl.float32)
    for first_channel in range(0, K, BD):
        tile = load_input_rows(x, first_token, tokens, head, STRIDES, K, first_channel, C, BD)
        squares += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), axis=1)
    return 1 / tl.sqrt(squares + EPS)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=NUMBERS)
def prepare_channels_kernel(
    q, k, g, beta, A_log, dt_bias, factors, matrices, cu_seqlens, scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, L2_NORM: tl.constexpr, FUSED_GATE: tl.constexpr,
    LOWER_BOUND: tl.constexpr, FUSED_SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr,
    SAVE: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
    G_STRIDES: tl.constexpr, BETA_STRIDES: tl.constexpr,
):  # fmt: skip
    """A diag(beta), P and A. BD: channels that are in registers at a time. SAVE: backward follows,
    so INVERSE is written too, and all of `factors` and `matrices` is defined."""
    chunk_head = tl.program_id(0).to(tl.int64)
    slot, head = chunk_head // HV, chunk_head % HV
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if tokens <= 0:
        if SAVE:
            clear_saved(factors, matrices, chunk_head, C)
        return
    qk_head = head // (HV // H)
    dtype: tl.constexpr = k.dtype.element_ty
    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    g = find_batch_row(g, first_token, T, G_STRIDES)
    beta = find_batch_row(beta, first_token, T, BETA_STRIDES)
    rq, rk = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    if L2_NORM:
        rq = load_reciprocal_norms(q, first_token, tokens, qk_head, Q_STRIDES, K, C, BD)
        rk = load_reciprocal_norms(k, first_token, tokens, qk_head, K_STRIDES, K, C, BD)
    strength = load_input_scalars(beta, first_token, tokens, head, BETA_STRIDES, C)  # beta, [C]
    if FUSED_SIGMOID:
        strength = BETA_SCALE * tl.sigmoid(strength)
    strength = tl.where(tl.arange(0, C) < tokens, strength, 0.0)

    # === matrices ===
    P, M = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)  # without scale and beta
    P_diagonal = tl.zeros([C], tl.float32)
    for first_channel in range(0, K, BD):
        _, log_decay = load_channel_gates(
            g, A_log, dt_bias, first_token, tokens, head, first_channel, G_STRIDES, K, C, BD,
            FUSED_GATE, LOWER_BOUND,
        )  # fmt: skip
        G = sum_gates(log_decay, dtype)  # [C, BD]
        queries = load_input_rows(
            q, first_token, tokens, qk_head, Q_STRIDES, K, first_channel, C, BD
        )
        keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, first_channel, C, BD)
        P_diagonal += rq * rk * tl.sum(queries.to(tl.float32) * keys.to(tl.float32), axis=1)
        for level in range(LEVELS):
            f = level_factors(G, level, C, BD)
            decayed_q = round_decayed(rq[:, None] * queries.to(tl.float32) * f, dtype)
            decayed_k = round_decayed(rk[:, None] * keys.to(tl.float32) * f, dtype)
            decayed_k_T, pairs = tl.trans(decayed_k), level_pairs(level, C)
            P += tl.where(pairs, dot_decayed(decayed_q, decayed_k_T, dtype), 0.0)
            M += tl.where(pairs, dot_decayed(decayed_k, decayed_k_T, dtype), 0.0)
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    P = scale * (mask_strictly_lower(P, C) + tl.where(row == column, P_diagonal[:, None], 0.0))
    store_matrix(matrices, P, chunk_head * NUM_MATRICES + SCORES, 0, C, C, C)
    A = invert_unit_lower(mask_strictly_lower(strength[:, None] * M, C), C, dtype)
    store_matrix(matrices, A * strength[None, :], chunk_head * NUM_MATRICES + A_BETA, 0, C, C, C)
    if SAVE:
        store_matrix(matrices, A, chunk_head * NUM_MATRICES + INVERSE, 0, C, C, C)
        store_factor(factors, tl.zeros([C], tl.float32), chunk_head, GATE_SUM, C)
        store_factor(factors, tl.zeros([C], tl.float32), chunk_head, GATE_SUM_RESIDUAL, C)
    store_factor(factors, strength, chunk_head, BETA, C)
    store_factor(factors, rq, chunk_head, RQ, C)
    store_factor(factors, rk, chunk_head, RK, C)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=NUMBERS)
def decay_rows_kernel(
    q, k, g, A_log, dt_bias, factors, matrices, decayed_rows, channel_decays, cu_seqlens,
    scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, G_STRIDES: tl.constexpr,
):  # fmt: skip
    """What `prepare_channels_kernel` leaves: `decayed_rows`, their scales and `channel_decays`."""
    chunk_head = tl.program_id(0).to(tl.int64)
    slot, head = chunk_head // HV, chunk_head % HV
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if tokens <= 0:
        return
    dtype: tl.constexpr = k.dtype.element_ty
    qk_head = head // (HV // H)
    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    g = find_batch_row(g, first_token, T, G_STRIDES)
    _, log_decay = load_channel_gates(
        g, A_log, dt_bias, first_token, tokens, head, 0, G_STRIDES, K, C, BK, FUSED_GATE,
        LOWER_BOUND,
    )  # fmt: skip
    G = sum_gates(log_decay, dtype)  # [C, K]
    is_last = tl.arange(0, C)[:, None] == C - 1
    gamma = tl.sum(tl.where(is_last, G, 0.0), axis=0)  # [K]
    decay = tl.exp(gamma.to(tl.float32))
    tl.store(channel_decays + chunk_head * BK + tl.arange(0, BK), decay)

    rk = load_factor(factors, chunk_head, RK, C)
    keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK)
    keys = rk[:, None] * keys.to(tl.float32)
    K_out = keys * tl.exp((gamma[None, :] - G).to(tl.float32))
    store_decayed_rows(K_out, K_OUT, U_TO_STATE, decayed_rows, factors, chunk_head, C, BK)
    prefix = tl.exp(G.to(tl.float32))
    A_beta = load_matrix(matrices, chunk_head * NUM_MATRICES + A_BETA, 0, C, C, C)
    K_in, A_beta = round_decayed(keys * prefix, dtype), round_decayed(A_beta.to(tl.float32), dtype)
    W_rows = dot_decayed(A_beta, K_in, dtype)
    store_decayed_rows(W_rows, W, KS_TO_E, decayed_rows, factors, chunk_head, C, BK)
    rq = load_factor(factors, chunk_head, RQ, C)
    queries = load_input_rows(q, first_token, tokens, qk_head, Q_STRIDES, K, 0, C, BK)
    Q_in = (scale * rq)[:, None] * queries.to(tl.float32) * prefix
    store_decayed_rows(Q_in, Q_IN, QS_TO_O, decayed_rows, factors, chunk_head, C, BK)
