"""The first stage of backward after forward's scan, a program a piece, value head and block of
V: the gradient of the state, chunk by chunk from the last to the first.

    dU = P^T dO + e^{gamma - G} * (K dS),   R = A^T dU
    dS <- e^gamma dS + Q^T (scale e^G * dO) - K^T (A_k^T dU)

Transposed as in `scan.py`: dS^T [BV, K] stays in registers. Reads q, k, `factors`, `matrices` and
dO; writes R^T and the gradient of the state after every chunk (with KEEP), and that of the initial
state. CUT as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    A_K,
    INVERSE,
    MATRICES,
    ONTO,
    READ,
    SCORES,
    chunk_decay,
    dot,
    load_factor,
    load_matrix,
    load_rows,
    narrow,
    span,
    store_matrix,
    tile_offsets,
)


@triton.jit
def retreat(
    dS, q, k, factors, matrices, do, R_out, grad_states, start, count, block, head, first,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, KEEP: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """One chunk: the gradient of the state before it."""
    kh = head // (HV // H)
    dtype: tl.constexpr = k.dtype.element_ty
    queries = load_rows(q, start, count, kh, H, K, 0, C, BK, FULL)
    keys = load_rows(k, start, count, kh, H, K, 0, C, BK, FULL)
    grad_o = tl.trans(load_rows(do, start, count, head, HV, V, first, C, BV, FULL))
    through_k = load_matrix(matrices, block * MATRICES + A_K, 0, C, C, C)
    scores = load_matrix(matrices, block * MATRICES + SCORES, 0, C, C, C)
    onto = load_factor(factors, block, ONTO, C)
    read = load_factor(factors, block, READ, C)
    decay = chunk_decay(factors, block, C)

    after = narrow(dS, dtype)
    if KEEP:
        kept, inside = tile_offsets(block, first, K, V, BK, BV, True)
        tl.store(grad_states + kept, after, mask=inside)
    dU = onto[None, :] * dot(after, tl.trans(keys)) + dot(grad_o, scores)
    dU = narrow(dU, dtype)
    if KEEP:
        R = dot(dU, load_matrix(matrices, block * MATRICES + INVERSE, 0, C, C, C))
        store_matrix(R_out, R, block, first, V, BV, C)
    dS = decay * dS
    dS += dot(narrow(read[None, :] * grad_o.to(tl.float32), dtype), queries)
    return dS - dot(narrow(dot(dU, through_k), dtype), keys)


@triton.jit
def reverse_scan_kernel(
    q, k, factors, matrices, do, grad_final, R_out, grad_states, grad_initial,
    cu_seqlens, N, T, NT, each, LENGTH,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    V_FIRST: tl.constexpr, FINAL: tl.constexpr, INITIAL: tl.constexpr, KEEP: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    piece_head, first = program // blocks, ((program % blocks) * BV).to(tl.int32)
    piece, head = piece_head // HV, piece_head % HV
    start, tokens, slot = span(piece, cu_seqlens, N, T, NT, each, LENGTH, VARLEN, CUT, C)
    at, inside = tile_offsets(piece_head, first, K, V, BK, BV, V_FIRST)
    dS = tl.zeros([BV, BK], tl.float32)
    if FINAL:
        dS = tl.load(grad_final + at, mask=inside, other=0.0).to(tl.float32)
    block = slot * HV + head
    whole = (tokens // C).to(tl.int32)
    if tokens > whole * C:
        dS = retreat(
            dS, q, k, factors, matrices, do, R_out, grad_states, start + whole * C,
            tokens - whole * C, block + whole * HV, head, first, H, HV, K, V, BK, BV, C, KEEP,
            False,
        )  # fmt: skip
    for step in range(whole):
        chunk = whole - 1 - step
        dS = retreat(
            dS, q, k, factors, matrices, do, R_out, grad_states, start + chunk * C, C,
            block + chunk * HV, head, first, H, HV, K, V, BK, BV, C, KEEP, True,
        )  # fmt: skip
    if INITIAL:
        tl.store(grad_initial + at, dS, mask=inside)
