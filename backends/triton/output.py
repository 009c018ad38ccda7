"""Stage 3 of forward, and the first of backward, a program a chunk, value head and block of V.

    P = scale tril(L_ij q_i.k_j),   O = scale e^G * (Q S) + P U      forward
                                    dU = P^T dO, its local part      backward

Forward reads q, k, G, U and the state before the chunk, and writes o; backward reads q, k, G and
the gradient of o, and writes dU. Nothing here waits for another chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    decay_matrix,
    dot,
    load_columns,
    load_decay,
    load_rows,
    locate,
    narrow,
    reciprocal_norm,
    store_rows,
    tile_offsets,
)


@triton.jit
def output_kernel(
    q, k, G, states, U, o, scale,
    cu_seqlens, slot_sequence, slot_chunk, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    slot_head, first = program // blocks, (program % blocks) * BV
    slot, head = slot_head // HV, slot_head % HV
    start, count = locate(slot, cu_seqlens, slot_sequence, slot_chunk, T, NT, VARLEN, C)
    if count <= 0:
        return
    kh = head // (HV // H)
    dtype: tl.constexpr = q.dtype.element_ty
    queries = load_rows(q, start, count, kh, H, K, 0, C, BK)
    keys = load_rows(k, start, count, kh, H, K, 0, C, BK)
    turned = load_columns(k, start, count, kh, H, K, 0, C, BK)
    decay, _ = load_decay(G, start, count, head, HV, C)
    at, inside = tile_offsets(slot_head, first, K, V, BK, BV, False)
    S = tl.load(states + at, mask=inside, other=0.0)
    rq, rk = scale * reciprocal_norm(queries, L2), reciprocal_norm(keys, L2)

    P = rq[:, None] * rk[None, :] * decay_matrix(decay, C) * dot(queries, turned)
    out = (rq * tl.exp(decay))[:, None] * dot(queries, S)
    out += dot(narrow(P, dtype), load_rows(U, start, count, head, HV, V, first, C, BV))
    store_rows(o, out, start, count, head, HV, V, first, C, BV)


@triton.jit
def local_gradient_kernel(
    q, k, G, do, dU, scale,
    cu_seqlens, slot_sequence, slot_chunk, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    slot_head, first = program // blocks, (program % blocks) * BV
    slot, head = slot_head // HV, slot_head % HV
    start, count = locate(slot, cu_seqlens, slot_sequence, slot_chunk, T, NT, VARLEN, C)
    if count <= 0:
        return
    kh = head // (HV // H)
    dtype: tl.constexpr = q.dtype.element_ty
    queries = load_rows(q, start, count, kh, H, K, 0, C, BK)
    keys = load_rows(k, start, count, kh, H, K, 0, C, BK)
    turned = load_columns(q, start, count, kh, H, K, 0, C, BK)
    decay, _ = load_decay(G, start, count, head, HV, C)
    rq, rk = scale * reciprocal_norm(queries, L2), reciprocal_norm(keys, L2)

    j, i = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    L = tl.where(i >= j, tl.exp(tl.where(i >= j, decay[None, :] - decay[:, None], 0.0)), 0.0)
    P = rk[:, None] * rq[None, :] * L * dot(keys, turned)  # [j, i]: transposed as it is made
    grad = dot(narrow(P, dtype), load_rows(do, start, count, head, HV, V, first, C, BV))
    store_rows(dU, grad, start, count, head, HV, V, first, C, BV)
