"""Backward: the gradient of q, and the part of G's gradient that comes from o.

With S the state before the chunk, dP = tril(dO U^T), and * elementwise, for each value head

    dQ = scale e^G * (dO S^T) + scale (dP * L) K
    dG = rowsum(Q * scale e^G * (dO S^T)) + rowsum(dP * P) - colsum(dP * P)

for normalised q and k, of which `prepare.py` explains the notation. Then follows the gradient
through the L2 norm.

A program takes a chunk and q/k head. It sums dQ over the value heads in float32 and in order, so
that two runs are bit-equal. Reads q, k, `factors`, P, dO, U^T and the states. Writes dq, and dG
[slots, HV, C] in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import backpropagate_norm
from .chunk_buffers import (
    NUM_MATRICES,
    QS_TO_O,
    RK,
    RQ,
    SCORES,
    load_factor,
    load_gate_sums,
    load_matrix,
    multiply_by_scales,
)
from .indexing import COUNTS, locate_chunk
from .launch import ANY_ALIGNMENT
from .tiles import (
    clear_rows,
    compute_decay_matrix,
    dot,
    dot_rounded,
    find_batch_row,
    load_input_rows,
    load_rows,
    load_state,
    mask_strictly_lower,
    store_rows,
)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def query_gradients_kernel(
    q, k, factors, matrices, states, U, row_scales, grad_o, dq, dG_from_o, cu_seqlens,
    scale, N, T, chunks_per_sequence,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    L2_NORM: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot, qk_head = program // H, program % H
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if VARLEN:  # tokens past the last sequence
        clear_rows(
            dq, first_token, tl.load(cu_seqlens + N).to(tl.int64), T, qk_head, H, K, 0, C, BK
        )
    if tokens <= 0:
        return
    dtype: tl.constexpr = q.dtype.element_ty
    q, k = (
        find_batch_row(q, first_token, T, Q_STRIDES), find_batch_row(k, first_token, T, K_STRIDES)
    )  # fmt: skip
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    rq = load_factor(factors, slot * HV + qk_head * (HV // H), RQ, C)
    rk = load_factor(factors, slot * HV + qk_head * (HV // H), RK, C)
    dq_tile = tl.zeros([C, BK], tl.float32)
    dP_L_sum = tl.zeros([C, C], tl.float32)  # dP * L, summed over the value heads
    for group in range(HV // H):
        head = qk_head * (HV // H) + group
        chunk_head = slot * HV + head
        dP = tl.zeros([C, C], tl.float32)
        dO_S_T = tl.zeros([C, BK], tl.float32)
        for first_v in range(0, V, BV):
            dO = load_rows(grad_o, first_token, tokens, head, HV, V, first_v, C, BV)  # [C, BV]
            dO = multiply_by_scales(dO, row_scales, chunk_head, first_v, V, BV)
            dO_S_T += dot(dO, load_state(states, chunk_head, first_v, K, V, BK, BV))
            dP += dot(dO, load_matrix(U, chunk_head, first_v, V, BV, C))
        dO_S_T *= load_factor(factors, chunk_head, QS_TO_O, C)[:, None]  # scale e^G rq * (dO S^T)
        dq_tile += dO_S_T
        queries = load_input_rows(q, first_token, tokens, qk_head, Q_STRIDES, K, 0, C, BK)  # [C, K]
        P = load_matrix(matrices, chunk_head * NUM_MATRICES + SCORES, 0, C, C, C).to(tl.float32)
        dP_P = mask_strictly_lower(dP * P, C)  # without the diagonal, where L is 1 for any G
        dP_L_sum += dP * compute_decay_matrix(load_gate_sums(factors, chunk_head, C, dtype), C)
        dG = tl.sum(queries.to(tl.float32) * dO_S_T, axis=1) + tl.sum(dP_P, axis=1)
        tl.store(dG_from_o + chunk_head * C + tl.arange(0, C), dG - tl.sum(dP_P, axis=0))

    # QS_TO_O includes rq, but dq_tile is the gradient of the normalised q until here
    dq_tile = dq_tile / rq[:, None]
    dP_L_sum = scale * tl.where(row >= column, dP_L_sum, 0.0) * rk[None, :]
    keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK)  # [C, K]
    dq_tile += dot_rounded(dP_L_sum, keys, dtype)
    if L2_NORM:
        queries = load_input_rows(q, first_token, tokens, qk_head, Q_STRIDES, K, 0, C, BK)
        dq_tile = backpropagate_norm(dq_tile, queries.to(tl.float32), rq)
    store_rows(dq, dq_tile, first_token, tokens, qk_head, H, K, 0, C, BK)
