"""Forward, stage 1 of float16 and float32 calls with a decay per channel: everything in a chunk
that does not depend on the state. bfloat16 calls have `channel_sums.py` and `channel_forward.py`
in its place. Backward runs its last part again in all dtypes, since those results take too much
memory to be saved.

    M_ij = beta_i sum_c k_ic k_jc D_ijc for i > j,     A = (I + M)^-1
    P_ij = scale sum_c q_ic k_jc D_ijc for i >= j
    W = A diag(beta) (e^G * K),   Q_in = scale e^G * Q,   K_out = e^{gamma - G} * K

for normalised q and k; `channel_decay.py` explains D, `prepare.py` the rest. With them the scan is

    U = A beta V - W S,   O = Q_in S + P U,   S <- e^gamma * S + K_out^T U

where e^gamma scales the rows of S. The products with S and U need one matrix fewer in a row than
`scan.py` has for a decay per head.

A program takes a chunk and value head. It reads q, k and g [C, K] and beta [C], and writes
`factors`, `matrices`, `decayed_rows` and `channel_decays` (see `chunk_buffers.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import EPS, LOG2_E, exp2_flushed, exp_flushed, sigmoid
from .channel_decay import (
    NUMBERS,
    dot_decayed,
    load_channel_gates,
    prefix_sums,
    round_decayed,
    split,
    suffix_sums,
)
from .channel_pairs import multiply_pairs
from .chunk_buffers import (
    A_BETA,
    BETA,
    GATE_SUM,
    GATE_SUM_RESIDUAL,
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
    store_inverse,
    store_matrix,
)
from .gate_buffers import part_entries, store_selectors
from .indexing import COUNTS, locate_chunk
from .inverse import invert_unit_lower
from .tiles import (
    dot,
    find_batch_row,
    load_input_rows,
    load_input_scalars,
    mask_strictly_lower,
    round_rows,
    round_to,
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
def load_all_gates(
    g, A_log, dt_bias, channel_decays, first_token, tokens, chunk_head,
    G_STRIDES: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The parts of g of all channels, [C, BK]. Write an entry of `channel_decays`."""
    _, log_decay = load_channel_gates(
        g, A_log, dt_bias, first_token, tokens, chunk_head % HV, 0, G_STRIDES, K, C, BK, FUSED_GATE,
        LOWER_BOUND,
    )  # fmt: skip
    decay = exp_flushed(tl.sum(log_decay, axis=0))
    tl.store(channel_decays + chunk_head * BK + tl.arange(0, BK), decay)
    return split(log_decay * LOG2_E, dtype)


@triton.jit
def load_strength(
    beta, first_token, tokens, T, head, STRIDES: tl.constexpr, C: tl.constexpr,
    FUSED_SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr,
):  # fmt: skip
    """beta of a chunk and head in float32, zero past the end, [C]."""
    beta = find_batch_row(beta, first_token, T, STRIDES)
    strength = load_input_scalars(beta, first_token, tokens, head, STRIDES, C)
    if FUSED_SIGMOID:
        strength = BETA_SCALE * sigmoid(strength)
    return tl.where(tl.arange(0, C) < tokens, strength, 0.0)


@triton.jit
def dot_rows(x, y, C: tl.constexpr):
    """x_i.y_i of all rows, [C]: the diagonal of a product, since sums over channels take more
    instructions."""
    on_diagonal = tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :]
    return tl.sum(tl.where(on_diagonal, dot(x, tl.trans(y)), 0.0), axis=1)


@triton.jit
def write_decayed_rows(
    q, k, high, low, rq, rk, A_beta, factors, decayed_rows, first_token, tokens, chunk_head, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
):  # fmt: skip
    """Write an entry of `decayed_rows` and its scales, from the parts of g, reciprocal norms and
    A diag(beta)."""
    dtype: tl.constexpr = k.dtype.element_ty
    qk_head = chunk_head % HV // (HV // H)
    keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK)
    keys = rk[:, None] * keys.to(tl.float32)
    K_out = keys * exp2_flushed(suffix_sums(high, low, C, dtype))
    store_decayed_rows(K_out, K_OUT, U_TO_STATE, decayed_rows, factors, chunk_head, C, BK)
    prefix = exp2_flushed(prefix_sums(high, low, C, dtype))
    W_rows = dot_decayed(round_decayed(A_beta, dtype), round_decayed(keys * prefix, dtype), dtype)
    store_decayed_rows(W_rows, W, KS_TO_E, decayed_rows, factors, chunk_head, C, BK)
    queries = load_input_rows(q, first_token, tokens, qk_head, Q_STRIDES, K, 0, C, BK)
    Q_in = (scale * rq)[:, None] * queries.to(tl.float32) * prefix
    store_decayed_rows(Q_in, Q_IN, QS_TO_O, decayed_rows, factors, chunk_head, C, BK)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=NUMBERS)
def prepare_channels_kernel(
    q, k, g, beta, A_log, dt_bias, factors, matrices, decayed_rows, channel_decays, cu_seqlens,
    scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, VARLEN: tl.constexpr, L2_NORM: tl.constexpr, FUSED_GATE: tl.constexpr,
    LOWER_BOUND: tl.constexpr, WEAK: tl.constexpr, FUSED_SIGMOID: tl.constexpr,
    BETA_SCALE: tl.constexpr, SAVE: tl.constexpr, Q_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr, G_STRIDES: tl.constexpr, BETA_STRIDES: tl.constexpr,
):  # fmt: skip
    """BD: channels that are in registers at a time. SAVE: backward follows, so INVERSE
    is written too, and all of `factors` and `matrices` is defined."""
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
    strength = load_strength(
        beta, first_token, tokens, T, head, BETA_STRIDES, C, FUSED_SIGMOID, BETA_SCALE
    )

    # === matrices, of raw rows ===
    P, M = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    QK = tl.zeros([C], tl.float32)  # products of a token's rows
    QQ, KK = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    WHOLE: tl.constexpr = BD == BK
    if WHOLE:
        high, low = load_all_gates(
            g, A_log, dt_bias, channel_decays, first_token, tokens, chunk_head, G_STRIDES, HV, K,
            BK, C, FUSED_GATE, LOWER_BOUND, dtype,
        )  # fmt: skip
    for first_channel in range(0, K, BD):
        if not WHOLE:
            _, log_decay = load_channel_gates(
                g, A_log, dt_bias, first_token, tokens, head, first_channel, G_STRIDES, K, C, BD,
                FUSED_GATE, LOWER_BOUND,
            )  # fmt: skip
            high, low = split(log_decay * LOG2_E, dtype)
        queries = load_input_rows(
            q, first_token, tokens, qk_head, Q_STRIDES, K, first_channel, C, BD
        )
        keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, first_channel, C, BD)
        QK += dot_rows(queries, keys, C)
        if L2_NORM:
            QQ += dot_rows(queries, queries, C)
            KK += dot_rows(keys, keys, C)
        P_tile, M_tile = multiply_pairs(queries, keys, high, low, C, dtype, WEAK)
        P, M = P + P_tile, M + M_tile
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    rq, rk = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    if L2_NORM:
        rq, rk = 1 / tl.sqrt(QQ + EPS), 1 / tl.sqrt(KK + EPS)
    P = tl.where(row > column, P, tl.where(row == column, QK[:, None], 0.0))
    P = (scale * rq)[:, None] * P * rk[None, :]
    store_matrix(matrices, P, chunk_head * NUM_MATRICES + SCORES, 0, C, C, C)
    M = (strength * rk)[:, None] * M * rk[None, :]
    A = invert_unit_lower(mask_strictly_lower(M, C), C, dtype)
    A_beta = round_to(A * strength[None, :], dtype)
    store_inverse(matrices, A, A_beta, chunk_head, C, SAVE)
    if SAVE:
        store_factor(factors, tl.zeros([C], tl.float32), chunk_head, GATE_SUM, C)
        store_factor(factors, tl.zeros([C], tl.float32), chunk_head, GATE_SUM_RESIDUAL, C)
    store_factor(factors, strength, chunk_head, BETA, C)
    store_factor(factors, rq, chunk_head, RQ, C)
    store_factor(factors, rk, chunk_head, RK, C)

    # === rows ===
    if not WHOLE:
        high, low = load_all_gates(
            g, A_log, dt_bias, channel_decays, first_token, tokens, chunk_head, G_STRIDES, HV, K,
            BK, C, FUSED_GATE, LOWER_BOUND, dtype,
        )  # fmt: skip
    write_decayed_rows(
        q, k, high, low, rq, rk, A_beta.to(tl.float32), factors, decayed_rows, first_token, tokens,
        chunk_head, scale, H, HV, K, BK, C, Q_STRIDES, K_STRIDES,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=NUMBERS)
def decay_rows_kernel(
    q, k, g, A_log, dt_bias, factors, matrices, decayed_rows, channel_decays, selectors, gate_parts,
    cu_seqlens, scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, G_STRIDES: tl.constexpr,
):  # fmt: skip
    """`decayed_rows`, their scales and `channel_decays`, for backward, with `gate_buffers.py`."""
    chunk_head = tl.program_id(0).to(tl.int64)
    if chunk_head == 0:
        store_selectors(selectors, C)
    first_token, tokens = locate_chunk(
        chunk_head // HV, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C
    )
    if tokens <= 0:
        return
    dtype: tl.constexpr = k.dtype.element_ty
    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    g = find_batch_row(g, first_token, T, G_STRIDES)
    rq = load_factor(factors, chunk_head, RQ, C)
    rk = load_factor(factors, chunk_head, RK, C)
    A_beta = load_matrix(matrices, chunk_head * NUM_MATRICES + A_BETA, 0, C, C, C)
    high, low = load_all_gates(
        g, A_log, dt_bias, channel_decays, first_token, tokens, chunk_head, G_STRIDES, HV, K, BK,
        C, FUSED_GATE, LOWER_BOUND, dtype,
    )  # fmt: skip
    first, second = part_entries(gate_parts, chunk_head, 0, C, BK, BK, dtype)
    tl.store(first, high)
    if dtype != tl.float32:
        tl.store(second, low)
    write_decayed_rows(
        q, k, high, low, rq, rk, A_beta.to(tl.float32), factors, decayed_rows, first_token, tokens,
        chunk_head, scale, H, HV, K, BK, C, Q_STRIDES, K_STRIDES,
    )  # fmt: skip
