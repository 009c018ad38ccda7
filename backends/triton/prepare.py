"""Stage 1 of forward, a program a chunk and value head: gates, and the inverse that couples a
chunk's tokens.

    g = -exp(A_log) softplus(g_raw + dt_bias), beta = c sigmoid(beta_raw)    where fused
    G = cumsum(g) within the chunk,  L_ij = exp(G_i - G_j)
    A = (I + tril(beta_i L_ij k_i.k_j, -1))^-1

Reads k once a value head, g and beta; writes G, beta (float32, [tokens, HV]) and A (the call's
dtype, [tokens, HV, C]).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    decay_matrix,
    dot,
    invert,
    load_columns,
    load_rows,
    load_scalars,
    locate,
    reciprocal_norm,
    store_rows,
    store_scalars,
    strictly_lower,
)


@triton.jit
def softplus(x):
    """log(1 + e^x), exact for large and for very negative x."""
    y = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(y < 1e-4, y - y * y / 2, tl.log(1 + y))


@triton.jit
def prepare_kernel(
    k, g, beta, A_log, dt_bias, G_out, beta_out, A_out,
    cu_seqlens, slot_sequence, slot_chunk, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, L2: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot, head = program // HV, program % HV
    start, count = locate(slot, cu_seqlens, slot_sequence, slot_chunk, T, NT, VARLEN, C)
    if count <= 0:
        return
    live = tl.arange(0, C) < count

    step = load_scalars(g, start, count, head, HV, C)
    if GATE:
        if BIAS:
            step += tl.load(dt_bias + head).to(tl.float32)
        step = -tl.exp(tl.load(A_log + head).to(tl.float32)) * softplus(step)
    G = tl.cumsum(tl.where(live, step, 0.0), axis=0)
    strength = load_scalars(beta, start, count, head, HV, C)
    if SIGMOID:
        strength = BETA_SCALE * tl.sigmoid(strength)
    strength = tl.where(live, strength, 0.0)

    kh = head // (HV // H)
    keys = load_rows(k, start, count, kh, H, K, 0, C, BK)
    turned = load_columns(k, start, count, kh, H, K, 0, C, BK)
    r = reciprocal_norm(keys, L2)
    kk = dot(keys, turned) * r[:, None] * r[None, :]
    A = invert(strictly_lower(strength[:, None] * decay_matrix(G, C) * kk, C), C)

    store_scalars(G_out, G, start, count, head, HV, C)
    store_scalars(beta_out, strength, start, count, head, HV, C)
    store_rows(A_out, A, start, count, head, HV, C, 0, C, C)
