"""Stage 2 of forward, a program a sequence, value head and block of V: the state, chunk by chunk.

    E = V - e^G * (K S),  U = A (beta * E),  S <- e^gamma S + K^T (e^{gamma - G} * U)

S [K, BV] stays in registers. Reads k, v, G, beta, A; writes the state before every chunk and U, for
the output stage and for backward, and the final state. Under the fused L2 norm, products take raw k
and the rows' reciprocal norms multiply what comes out.
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
def scan_kernel(
    k, v, G, beta, A, initial, states, U_out, final,
    cu_seqlens, first_slot, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, L2: tl.constexpr,
    V_FIRST: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    sequence_head, first = program // blocks, (program % blocks) * BV
    n, head = sequence_head // HV, sequence_head % HV
    start, tokens, slot = span(n, cu_seqlens, first_slot, T, NT, VARLEN)
    kh = head // (HV // H)
    dtype: tl.constexpr = k.dtype.element_ty

    at, inside = tile_offsets(sequence_head, first, K, V, BK, BV, V_FIRST)
    S = tl.zeros([BK, BV], tl.float32)
    if INITIAL:
        S = tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    for done in range(0, tokens, C):
        here, count = start + done, tokens - done
        before, _ = tile_offsets((slot + done // C) * HV + head, first, K, V, BK, BV, False)
        tl.store(states + before, narrow(S, dtype), mask=inside)
        keys = load_rows(k, here, count, kh, H, K, 0, C, BK)
        turned = load_columns(k, here, count, kh, H, K, 0, C, BK)
        values = load_rows(v, here, count, head, HV, V, first, C, BV).to(tl.float32)
        inverse = load_rows(A, here, count, head, HV, C, 0, C, C)
        decay, total = load_decay(G, here, count, head, HV, C)
        strength = load_scalars(beta, here, count, head, HV, C)
        r = reciprocal_norm(keys, L2)

        E = values - (r * tl.exp(decay))[:, None] * dot(keys, narrow(S, dtype))
        U = dot(inverse, narrow(strength[:, None] * E, dtype))
        store_rows(U_out, U, here, count, head, HV, V, first, C, BV)
        S = tl.exp(total) * S + dot(turned, narrow((r * tl.exp(total - decay))[:, None] * U, dtype))
    if FINAL:
        tl.store(final + at, S, mask=inside)
