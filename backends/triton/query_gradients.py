"""A stage of backward, a program a chunk and q/k head: the gradient of q, and what o says of g.

With S the state before the chunk, dP = tril(dO U^T), and * elementwise, for each value head

    dQ = scale e^G * (dO S^T) + scale (dP * L) K
    dG_i from e^{G_i} in the first term, and from L_ij = e^{G_i - G_j} in the second

dQ is summed over the value heads of the q/k head in float32, in order, so that runs are bit-equal;
then follows the gradient through the L2 norm. Reads q, k, `factors`, P, dO, U^T and the states;
writes dq, and dG as rows of a float32 [slots, HV, C].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    MATRICES,
    NORM_K,
    NORM_Q,
    READ,
    SCORES,
    decay_matrix,
    dot,
    load_factor,
    load_matrix,
    load_rows,
    load_state,
    load_sums,
    locate,
    narrow,
    store_rows,
    strictly_lower,
    through_norm,
)


@triton.jit
def query_gradients_kernel(
    q, k, factors, matrices, states, U, do, dq, dG_out, cu_seqlens,
    scale, N, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot, kh = program // H, program % H
    start, count = locate(slot, cu_seqlens, N, T, NT, VARLEN, C)
    if count <= 0:
        return
    dtype: tl.constexpr = q.dtype.element_ty
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    norm_q = load_factor(factors, slot * HV + kh * (HV // H), NORM_Q, C)
    norm_k = load_factor(factors, slot * HV + kh * (HV // H), NORM_K, C)
    grad_q = tl.zeros([C, BK], tl.float32)
    from_k = tl.zeros([C, C], tl.float32)  # the sum of dP * L over the value heads
    for group in range(HV // H):
        head = kh * (HV // H) + group
        block = slot * HV + head
        dP = tl.zeros([C, C], tl.float32)
        inter = tl.zeros([C, BK], tl.float32)
        for first in range(0, V, BV):
            grad_o = load_rows(do, start, count, head, HV, V, first, C, BV)
            inter += dot(grad_o, load_state(states, block, first, K, V, BK, BV))
            dP += dot(grad_o, load_matrix(U, block, first, V, BV, C))
        inter *= load_factor(factors, block, READ, C)[:, None]
        grad_q += inter
        queries = load_rows(q, start, count, kh, H, K, 0, C, BK)
        P = load_matrix(matrices, block * MATRICES + SCORES, 0, C, C, C).to(tl.float32)
        dL = strictly_lower(dP * P, C)
        from_k += dP * decay_matrix(load_sums(factors, block, C, dtype), C)
        dG = tl.sum(queries.to(tl.float32) * inter, axis=1) + tl.sum(dL, axis=1)
        tl.store(dG_out + block * C + tl.arange(0, C), dG - tl.sum(dL, axis=0))

    # READ holds the norm of q, which the gradient of the normalised q must not
    grad_q = grad_q / norm_q[:, None]
    from_k = scale * tl.where(row >= column, from_k, 0.0) * norm_k[None, :]
    keys = load_rows(k, start, count, kh, H, K, 0, C, BK)
    grad_q += dot(narrow(from_k, dtype), keys)
    if L2:
        queries = load_rows(q, start, count, kh, H, K, 0, C, BK)
        grad_q = through_norm(grad_q, queries.to(tl.float32), norm_q)
    store_rows(dq, grad_q, start, count, kh, H, K, 0, C, BK)
