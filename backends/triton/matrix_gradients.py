"""Backward with a decay per channel, before the last stage: R and the gradients of v, P and M.

    R = A^T dU,   dV = beta * R,   dP = scale tril(dO U^T),   F = -tril(R U^T, -1)

A program takes a chunk and value head. Reads v, beta, A, dO, U^T and dU^T, which R^T replaces.
Writes dv, dP and F (see `grad_matrices.py`), and products [slots, HV, 3, C] in float32:
rowsum(R * V), rowsum(R * U) and the diagonal of dP.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_decay import NUMBERS
from .chunk_buffers import (
    BETA,
    INVERSE,
    NUM_MATRICES,
    load_factor,
    load_matrix,
    load_row_scales,
    multiply_by_scales,
    store_matrix,
)
from .grad_matrices import store_pairs
from .indexing import COUNTS, locate_chunk
from .tiles import (
    clear_rows,
    dot,
    dot_split,
    find_batch_row,
    load_input_rows,
    load_rows,
    store_rows_transposed,
)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=NUMBERS)
def matrix_gradients_kernel(
    v, factors, matrices, U, R, row_scales, grad_o, dv, grad_matrices, products, cu_seqlens,
    scale, N, T, chunks_per_sequence,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    V_STRIDES: tl.constexpr,
):  # fmt: skip
    chunk_head = tl.program_id(0).to(tl.int64)
    slot, head = chunk_head // HV, chunk_head % HV
    first_token, tokens = locate_chunk(slot, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C)
    if VARLEN:  # tokens past the last sequence
        end = tl.load(cu_seqlens + N).to(tl.int64)
        for first_v in range(0, V, BV):
            clear_rows(dv, first_token, end, T, head, HV, V, first_v, C, BV)
    if tokens <= 0:
        return
    v = find_batch_row(v, first_token, T, V_STRIDES)
    dtype: tl.constexpr = v.dtype.element_ty
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    strength = load_factor(factors, chunk_head, BETA, C)  # beta, [C]
    A = load_matrix(matrices, chunk_head * NUM_MATRICES + INVERSE, 0, C, C, C)
    R_dot_V, R_dot_U = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for first_v in range(0, V, BV):
        dU_T = load_matrix(R, chunk_head, first_v, V, BV, C)  # [BV, C]
        R_T = dot_split(dU_T, A.to(tl.float32)) if dtype == tl.float16 else dot(dU_T, A)
        tl.debug_barrier()  # other threads may still load dU^T
        store_matrix(R, R_T, chunk_head, first_v, V, BV, C)
        U_T = load_matrix(U, chunk_head, first_v, V, BV, C).to(tl.float32)
        R_dot_U += tl.sum(R_T * U_T, axis=0)
        R_T /= load_row_scales(row_scales, chunk_head, first_v, V, BV, dtype)[:, None]
        values = load_input_rows(v, first_token, tokens, head, V_STRIDES, V, first_v, C, BV)
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
    store_pairs(grad_matrices, scale * dO_U_T, scale * U_dO_T, chunk_head * 2, C)
    store_pairs(grad_matrices, -R_U_T, -strength[None, :] * U_R_T, chunk_head * 2 + 1, C)
    at = products + chunk_head * (3 * C) + tl.arange(0, C)
    tl.store(at, R_dot_V)
    tl.store(at + C, R_dot_U)
    tl.store(at + 2 * C, dP_diagonal)
