"""Stage 1 of forward, a program a chunk and value head: all that needs no state.

    g = -exp(A_log) softplus(g_raw + dt_bias), beta = c sigmoid(beta_raw)    where fused
    rq, rk = 1 / sqrt(sum x^2 + 1e-6) of the rows of q and k                 where fused
    G = cumsum(g) within the chunk,  L_ij = exp(G_i - G_j)
    A = (I + tril(beta_i L_ij k_i.k_j, -1))^-1,  P = scale tril(L_ij q_i.k_j)

Reads q, k, g and beta; writes `factors` and `matrices` (see `tiles.py`), A itself
only for backward (SAVE). Norms are applied to products of the raw rows, here and later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    A_K,
    A_V,
    EPS,
    FACTORS,
    FLOOR,
    INVERSE,
    LOG_DECAY,
    MATRICES,
    NORM_K,
    NORM_Q,
    ONTO,
    READ,
    REST,
    SCORES,
    STRENGTH,
    decay_matrix,
    dot,
    invert,
    last_of,
    load_rows,
    load_scalars,
    locate,
    log_decay,
    store_factor,
    store_matrix,
    strictly_lower,
)


@triton.jit
def reciprocal_norm(x):
    """1 / sqrt(sum x^2 + 1e-6) of each row."""
    wide = x.to(tl.float32)
    return 1 / tl.sqrt(tl.sum(wide * wide, axis=1) + EPS)


@triton.jit
def prepare_kernel(
    q, k, g, beta, A_log, dt_bias, factors, matrices, cu_seqlens,
    scale, N, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, L2: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    slot, head = block // HV, block % HV
    start, count = locate(slot, cu_seqlens, N, T, NT, VARLEN, C)
    if count <= 0:
        if SAVE:  # what is handed out is never left as it was found
            for which in tl.static_range(FACTORS):
                store_factor(factors, tl.zeros([C], tl.float32), block, which, C)
            for which in tl.static_range(MATRICES):
                nothing = tl.zeros([C, C], tl.float32)
                store_matrix(matrices, nothing, block * MATRICES + which, 0, C, C, C)
        return
    live = tl.arange(0, C) < count
    dtype: tl.constexpr = k.dtype.element_ty

    step = load_scalars(g, start, count, head, HV, C)
    if GATE:
        if BIAS:
            step += tl.load(dt_bias + head).to(tl.float32)
        step = log_decay(step, tl.load(A_log + head).to(tl.float32))
    step = tl.where(step < FLOOR, FLOOR, step)  # so that sums keep their digits; NaN stays
    step = tl.where(live, step, 0.0)  # so that G stays at its last value past the end
    # in float32 nothing else rounds as much as G_i - G_j does if both are sums of many gates
    wide: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32
    G = tl.cumsum(step.to(wide), axis=0)
    total = last_of(G, C)
    strength = load_scalars(beta, start, count, head, HV, C)
    if SIGMOID:
        strength = BETA_SCALE * tl.sigmoid(strength)
    strength = tl.where(live, strength, 0.0)

    kh = head // (HV // H)
    queries = load_rows(q, start, count, kh, H, K, 0, C, BK)
    keys = load_rows(k, start, count, kh, H, K, 0, C, BK)
    turned = tl.trans(keys)
    L = decay_matrix(G, C)
    left, rest = (total - G).to(tl.float32), (G - G.to(tl.float32)).to(tl.float32)
    G = G.to(tl.float32)
    P = L * dot(queries, turned)
    M = L * dot(keys, turned)
    rq, rk = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    if L2:
        rq, rk = reciprocal_norm(queries), reciprocal_norm(keys)
        P *= rk[None, :]
        M *= rk[None, :]
    store_matrix(matrices, (scale * rq)[:, None] * P, block * MATRICES + SCORES, 0, C, C, C)
    A = invert(strictly_lower((strength * rk)[:, None] * M, C), C, dtype)
    through_k = strength * rk * tl.exp(G)
    store_matrix(matrices, A * strength[None, :], block * MATRICES + A_V, 0, C, C, C)
    store_matrix(matrices, A * through_k[None, :], block * MATRICES + A_K, 0, C, C, C)
    if SAVE:
        store_matrix(matrices, A, block * MATRICES + INVERSE, 0, C, C, C)

    store_factor(factors, G, block, LOG_DECAY, C)
    store_factor(factors, strength, block, STRENGTH, C)
    store_factor(factors, rk * tl.exp(left), block, ONTO, C)
    store_factor(factors, scale * rq * tl.exp(G), block, READ, C)
    store_factor(factors, rq, block, NORM_Q, C)
    store_factor(factors, rk, block, NORM_K, C)
    store_factor(factors, rest, block, REST, C)
