"""Forward, stages 2 and 3 of bfloat16 calls with a decay per channel: a chunk's matrices and rows,
which `channel_prepare.py` explains, from the sums of `channel_sums.py`.

    P, M by `channel_blocks.py`,     A = (I + M)^-1
    W = A diag(beta) (2^G rk * K),   Q_in = scale rq 2^G * Q,   K_out = 2^{G_last - G} rk * K

A program takes a chunk and value head. It loads again what it needs again, and M goes through
memory, so that few registers are in use at a time: four programs of stage 2 and six of stage 3
share an SM.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import EPS, exp2_flushed
from .channel_blocks import RAW_RANGE, fit_normalised, multiply_blocks, multiply_levels
from .channel_inverse import invert_in_memory
from .channel_prepare import dot_rows, load_strength
from .channel_sums import BLOCK, FARTHEST, sum_entries
from .chunk_buffers import (
    A_BETA,
    BETA,
    GATE_SUM,
    GATE_SUM_RESIDUAL,
    K_OUT,
    KS_TO_E,
    NUM_DECAYED_ROWS,
    NUM_FACTORS,
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
)
from .indexing import COUNTS, locate_chunk
from .launch import ANY_ALIGNMENT
from .tiles import dot, find_batch_row, load_input_rows, round_to, row_entries


@triton.jit
def _find_rows(x, first_token, T, head, STRIDES: tl.constexpr):
    """x, moved to a head of a chunk's first token."""
    x = find_batch_row(x, first_token, T, STRIDES)
    return x + (first_token * STRIDES[1] + head * STRIDES[2])


@triton.jit
def _write_norms(
    q, k, matrices, factors, chunk_head, tokens, scale, farthest, K: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr, L2_NORM: tl.constexpr, Q_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr,
):  # fmt: skip
    """Write RQ and RK, the diagonal of P, and the block of zeros above it. Return whether both
    halves of the chunk may be one product each."""
    queries = load_input_rows(q, 0, tokens, 0, Q_STRIDES, K, 0, C, BK)
    keys = load_input_rows(k, 0, tokens, 0, K_STRIDES, K, 0, C, BK)
    if L2_NORM:
        QQ, KK = dot_rows(queries, queries, C), dot_rows(keys, keys, C)
        rq, rk = tl.rsqrt(QQ + EPS), tl.rsqrt(KK + EPS)
    else:
        rq, rk = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    store_factor(factors, rq, chunk_head, RQ, C)
    store_factor(factors, rk, chunk_head, RK, C)
    i = tl.arange(0, C)
    diagonal = matrices + (chunk_head * NUM_MATRICES + SCORES) * (C * C) + i * (C + 1)
    tl.store(diagonal, round_to(scale * rq * rk * dot_rows(queries, keys, C), tl.bfloat16))
    HALF: tl.constexpr = C // 2
    zeros = matrices + (chunk_head * NUM_MATRICES + SCORES) * (C * C) + HALF
    zeros += tl.arange(0, HALF)[:, None] * C + tl.arange(0, HALF)[None, :]
    tl.store(zeros, tl.zeros([HALF, HALF], tl.bfloat16))
    if L2_NORM:  # noqa: SIM108, Triton compiles both sides of an expression
        fits = fit_normalised(farthest, QQ, KK)
    else:
        fits = farthest <= RAW_RANGE
    return fits


@triton.jit
def _write_inverse(
    matrices, factors, chunk_head, C: tl.constexpr, SMALL: tl.constexpr, SAVE: tl.constexpr
):  # fmt: skip
    """Write A_BETA and, with SAVE, INVERSE, in place of M."""
    A = invert_in_memory(matrices, chunk_head, C, SMALL)
    tl.debug_barrier()  # M is read
    strength = load_factor(factors, chunk_head, BETA, C)
    A_beta = round_to(A * strength[None, :], tl.bfloat16)
    store_inverse(matrices, A, A_beta, chunk_head, C, SAVE)


@triton.jit
def _write_rows(
    q, k, A_beta, factors, decayed_rows, chunk_head, tokens, scale, K: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
):  # fmt: skip
    """Write W, Q_IN and K_OUT. The first two replace the sums of the same channels."""
    rq = (scale * load_factor(factors, chunk_head, RQ, C))[:, None]
    rk = load_factor(factors, chunk_head, RK, C)[:, None]
    r, c = tl.arange(0, C)[:, None], tl.arange(0, BLOCK)[None, :]
    last = tl.full([1, 1], C - 1, tl.int32)
    rows = chunk_head * NUM_DECAYED_ROWS
    for first_channel in range(0, BK, BLOCK):
        channel = first_channel + c
        G = tl.load(sum_entries(decayed_rows, chunk_head, r, channel, BK, C))
        first_half = tl.load(sum_entries(decayed_rows, chunk_head, last // 2, channel, BK, C))
        second_half = tl.load(sum_entries(decayed_rows, chunk_head, last, channel, BK, C))
        in_first = r < C // 2
        keys = load_input_rows(k, 0, tokens, 0, K_STRIDES, K, first_channel, C, BLOCK)
        keys = rk * keys.to(tl.float32)
        end = second_half + tl.where(in_first, first_half, 0.0)
        K_out = round_to(keys * exp2_flushed(end - G), tl.bfloat16)
        tl.store(row_entries(decayed_rows, rows + K_OUT, first_channel, C, BK, BLOCK), K_out)
        prefix = exp2_flushed(G + tl.where(in_first, 0.0, first_half))
        W_rows = dot(A_beta, round_to(keys * prefix, tl.bfloat16))
        queries = load_input_rows(q, 0, tokens, 0, Q_STRIDES, K, first_channel, C, BLOCK)
        Q_in = round_to(rq * queries.to(tl.float32) * prefix, tl.bfloat16)
        tl.debug_barrier()  # the sums are read
        tl.store(row_entries(decayed_rows, rows + Q_IN, first_channel, C, BK, BLOCK), Q_in)
        W_rows = round_to(W_rows, tl.bfloat16)
        tl.store(row_entries(decayed_rows, rows + W, first_channel, C, BK, BLOCK), W_rows)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def chunk_matrices_kernel(
    q, k, beta, factors, matrices, decayed_rows, cu_seqlens, scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, VARLEN: tl.constexpr, L2_NORM: tl.constexpr, FUSED_SIGMOID: tl.constexpr,
    BETA_SCALE: tl.constexpr, SAVE: tl.constexpr, Q_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr, BETA_STRIDES: tl.constexpr,
):  # fmt: skip
    """Write `factors` and `matrices`. BD: channels of a step of the products. SAVE: backward
    follows, so INVERSE is written too, and all of `factors` and `matrices` is defined."""
    chunk_head = tl.program_id(0).to(tl.int64)
    slot, head = chunk_head // HV, chunk_head % HV
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if tokens <= 0:
        if SAVE:
            clear_saved(factors, matrices, chunk_head, C)
        return
    tokens = tl.minimum(tokens, C).to(tl.int32)
    q = _find_rows(q, first_token, T, head // (HV // H), Q_STRIDES)
    k = _find_rows(k, first_token, T, head // (HV // H), K_STRIDES)
    strength = load_strength(
        beta, first_token, tokens, T, head, BETA_STRIDES, C, FUSED_SIGMOID, BETA_SCALE
    )
    farthest = tl.load(factors + (chunk_head * NUM_FACTORS + FARTHEST) * C)
    store_factor(factors, strength, chunk_head, BETA, C)
    fits = _write_norms(
        q, k, matrices, factors, chunk_head, tokens, scale, farthest, K, BK, C, L2_NORM, Q_STRIDES,
        K_STRIDES,
    )  # fmt: skip
    tl.debug_barrier()  # factors are written
    multiply_blocks(
        q, k, decayed_rows, matrices, factors, chunk_head, tokens, scale, K, BK, BD, C, Q_STRIDES,
        K_STRIDES,
    )  # fmt: skip
    if not fits:  # seldom
        tl.debug_barrier()
        multiply_levels(
            q, k, decayed_rows, matrices, factors, chunk_head, tokens, scale, K, BK, BD, C,
            Q_STRIDES, K_STRIDES,
        )  # fmt: skip
    tl.debug_barrier()  # M is written
    # |M_ij| <= beta_i of normalised rows
    SMALL: tl.constexpr = L2_NORM and FUSED_SIGMOID and BETA_SCALE <= 1
    _write_inverse(matrices, factors, chunk_head, C, SMALL, SAVE)
    if SAVE:
        store_factor(factors, tl.zeros([C], tl.float32), chunk_head, GATE_SUM, C)
        store_factor(factors, tl.zeros([C], tl.float32), chunk_head, GATE_SUM_RESIDUAL, C)
        store_factor(factors, tl.full([C], 1.0, tl.float32), chunk_head, U_TO_STATE, C)
        store_factor(factors, tl.full([C], 1.0, tl.float32), chunk_head, QS_TO_O, C)
        store_factor(factors, tl.full([C], 1.0, tl.float32), chunk_head, KS_TO_E, C)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def chunk_rows_kernel(
    q, k, factors, matrices, decayed_rows, cu_seqlens, scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
):  # fmt: skip
    """Write `decayed_rows` in place of the sums."""
    chunk_head = tl.program_id(0).to(tl.int64)
    slot, head = chunk_head // HV, chunk_head % HV
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if tokens <= 0:
        return
    tokens = tl.minimum(tokens, C).to(tl.int32)
    q = _find_rows(q, first_token, T, head // (HV // H), Q_STRIDES)
    k = _find_rows(k, first_token, T, head // (HV // H), K_STRIDES)
    A_beta = load_matrix(matrices, chunk_head * NUM_MATRICES + A_BETA, 0, C, C, C)
    _write_rows(
        q, k, A_beta, factors, decayed_rows, chunk_head, tokens, scale, K, BK, C, Q_STRIDES,
        K_STRIDES,
    )  # fmt: skip
