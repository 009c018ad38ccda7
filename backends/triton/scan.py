"""Stage 2 of forward, a program a piece, value head and block of V: the state, chunk by chunk.

    U = A_v V - A_k (K S)
    O = scale e^G * (Q S) + P U                 where OUTPUT
    S <- e^gamma S + K^T (e^{gamma - G} * U)

All of it transposed: S^T [BV, K] and U^T [BV, C] are then always the left operand of a product,
which tensor cores take from registers, so that the state never leaves them.

Reads k, v, `factors`, `matrices`, and q for the output; writes o and the final state in
forward. Backward runs it again for what it needs: the state before every chunk and U^T (STATES).

Where sequences are few, they are CUT into pieces that are walked at the same time, twice: first
each from a zero state, and (TRANSFER) with V = 0 from the identity in place of a state, which says
what the piece does to any state; then, after `carry.py`, from the states they really begin with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    A_K,
    A_V,
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
    store_columns,
    store_matrix,
    tile_offsets,
)


@triton.jit
def advance(
    S, q, k, v, factors, matrices, o, states, U_out, start, count, block, head, first,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, OUTPUT: tl.constexpr,
    STATES: tl.constexpr, TRANSFER: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One chunk: the state after it."""
    kh = head // (HV // H)
    dtype: tl.constexpr = k.dtype.element_ty
    keys = load_rows(k, start, count, kh, H, K, 0, C, BK, FULL)
    values = load_rows(v, start, count, head, HV, V, first % V if TRANSFER else first, C, BV, FULL)
    if TRANSFER:
        values = tl.where(first < V, values, 0.0)
    turned_v = tl.trans(load_matrix(matrices, block * MATRICES + A_V, 0, C, C, C))
    turned_k = tl.trans(load_matrix(matrices, block * MATRICES + A_K, 0, C, C, C))
    onto = load_factor(factors, block, ONTO, C)
    read = load_factor(factors, block, READ, C)
    decay = chunk_decay(factors, block, C)
    before = narrow(S, dtype)
    known = narrow(dot(before, tl.trans(keys)), dtype)
    U = dot(tl.trans(values), turned_v) - dot(known, turned_k)
    if STATES:
        kept, inside = tile_offsets(block, first, K, V, BK, BV, True)
        tl.store(states + kept, before, mask=inside)
        store_matrix(U_out, U, block, first, V, BV, C)
    if OUTPUT:
        queries = load_rows(q, start, count, kh, H, K, 0, C, BK, FULL)
        turned_P = tl.trans(load_matrix(matrices, block * MATRICES + SCORES, 0, C, C, C))
        out = read[None, :] * dot(before, tl.trans(queries)) + dot(narrow(U, dtype), turned_P)
        store_columns(o, out, start, count, head, HV, V, first, C, BV)
    written = narrow(onto[None, :] * U, dtype)
    return decay * S + dot(written, keys)


@triton.jit
def scan_kernel(
    q, k, v, factors, matrices, initial, o, final, states, U_out,
    cu_seqlens, N, T, NT, each, LENGTH,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    V_FIRST: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, OUTPUT: tl.constexpr,
    STATES: tl.constexpr, TRANSFER: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    rows: tl.constexpr = V + K if TRANSFER else V
    blocks: tl.constexpr = (rows + BV - 1) // BV
    piece_head, first = program // blocks, ((program % blocks) * BV).to(tl.int32)
    piece, head = piece_head // HV, piece_head % HV
    start, tokens, slot = span(piece, cu_seqlens, N, T, NT, each, LENGTH, VARLEN, CUT, C)
    at, inside = tile_offsets(piece_head, first, K, rows, BK, BV, V_FIRST)
    S = tl.zeros([BV, BK], tl.float32)
    if INITIAL:
        S = tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    if TRANSFER:
        S = tl.where(first - V + tl.arange(0, BV)[:, None] == tl.arange(0, BK)[None, :], 1.0, S)
    block = slot * HV + head
    whole = (tokens // C).to(tl.int32)
    for chunk in range(whole):
        S = advance(
            S, q, k, v, factors, matrices, o, states, U_out, start + chunk * C, C,
            block + chunk * HV, head, first, H, HV, K, V, BK, BV, C, OUTPUT, STATES,
            TRANSFER, True,
        )  # fmt: skip
    if tokens > whole * C:
        S = advance(
            S, q, k, v, factors, matrices, o, states, U_out, start + whole * C, tokens - whole * C,
            block + whole * HV, head, first, H, HV, K, V, BK, BV, C, OUTPUT, STATES,
            TRANSFER, False,
        )  # fmt: skip
    if FINAL:
        tl.store(final + at, S, mask=inside)
