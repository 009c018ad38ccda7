"""The second stage of backward, a program a sequence, value head and block of V: the gradient of
the state, chunk by chunk from the last to the first.

    dU = (P^T dO) + e^{gamma - G} * (K dS),   R = A^T dU,   dV = beta * R
    dS <- e^gamma dS + Q^T (scale e^G * dO) - K^T (e^G * dV)

dS [K, BV] stays in registers. Reads q, k, G, beta, A, dO and the local part of dU; writes R over
that part, the gradient of the state after every chunk, and that of the initial state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    dot,
    load_columns,
    load_decay,
    load_rows,
    load_scalars,
    narrow,
    reciprocal_norm,
    span,
    store_rows,
    tile_offsets,
)


@triton.jit
def reverse_scan_kernel(
    q, k, G, beta, A, do, dU, grad_final, grad_states, grad_initial, scale,
    cu_seqlens, first_slot, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, L2: tl.constexpr,
    V_FIRST: tl.constexpr, FINAL: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    sequence_head, first = program // blocks, (program % blocks) * BV
    n, head = sequence_head // HV, sequence_head % HV
    start, tokens, slot = span(n, cu_seqlens, first_slot, T, NT, VARLEN)
    kh = head // (HV // H)
    dtype: tl.constexpr = k.dtype.element_ty

    at, inside = tile_offsets(sequence_head, first, K, V, BK, BV, V_FIRST)
    dS = tl.zeros([BK, BV], tl.float32)
    if FINAL:
        dS = tl.load(grad_final + at, mask=inside, other=0.0).to(tl.float32)
    chunks = tl.cdiv(tokens, C)
    for step in range(chunks):
        chunk = chunks - 1 - step
        here, count = start + chunk * C, tokens - chunk * C
        after, _ = tile_offsets((slot + chunk) * HV + head, first, K, V, BK, BV, False)
        tl.store(grad_states + after, narrow(dS, dtype), mask=inside)
        queries = load_rows(q, here, count, kh, H, K, 0, C, BK)
        keys = load_rows(k, here, count, kh, H, K, 0, C, BK)
        turned_q = load_columns(q, here, count, kh, H, K, 0, C, BK)
        turned_k = load_columns(k, here, count, kh, H, K, 0, C, BK)
        turned_A = load_columns(A, here, count, head, HV, C, 0, C, C)
        grad_o = load_rows(do, here, count, head, HV, V, first, C, BV).to(tl.float32)
        local = load_rows(dU, here, count, head, HV, V, first, C, BV).to(tl.float32)
        decay, total = load_decay(G, here, count, head, HV, C)
        strength = load_scalars(beta, here, count, head, HV, C)
        rq, rk = scale * reciprocal_norm(queries, L2), reciprocal_norm(keys, L2)

        grad_U = local + (rk * tl.exp(total - decay))[:, None] * dot(keys, narrow(dS, dtype))
        R = dot(turned_A, narrow(grad_U, dtype))
        store_rows(dU, R, here, count, head, HV, V, first, C, BV)
        read = (rq * tl.exp(decay))[:, None] * grad_o
        written = (rk * strength * tl.exp(decay))[:, None] * R
        dS = tl.exp(total) * dS + dot(turned_q, narrow(read, dtype))
        dS -= dot(turned_k, narrow(written, dtype))
    if INITIAL:
        tl.store(grad_initial + at, dS, mask=inside)
