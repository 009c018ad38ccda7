"""The last stage of backward, a program a chunk and q/k head: the gradients of k, v, g and beta.

With S the state before the chunk, dS the gradient of that after it, dV = beta * R, * elementwise,
and W = tril(L_ij k_i.k_j, -1), for each value head

    dK = e^{gamma - G} * (U dS^T) - e^G * (dV S^T) + scale (dP * L)^T Q + (D + D^T) K
    dP = tril(dO U^T),  D = -beta * tril(L * (R U^T), -1)
    dbeta = rowsum(R * V) - rowsum(e^G * K * (R S^T)) - rowsum(W * (R U^T)) = rowsum(R * U) / beta

dg_t sums gradient times value over the factors e^{G_i} with i >= t, e^{G_i - G_j} with i >= t > j,
e^{gamma - G_j} with t > j, and e^gamma; o's share of it comes from `query_gradients.py`. dK is
summed over the value heads of the q/k head in float32, in order, so that runs are bit-equal. Then
follow the gradients through the L2 norm, the sigmoid and the gate.

Reads q, k, v, g, `factors`, dO, U^T, R^T, both states and o's share of dG; writes dk, dv, dg,
dbeta, and for the gate's parameters one partial sum a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    FACTORS,
    FLOOR,
    LOG_DECAY,
    NORM_K,
    NORM_Q,
    STRENGTH,
    decay_matrix,
    dot,
    last_of,
    load_factor,
    load_matrix,
    load_rows,
    load_scalars,
    load_state,
    load_sums,
    locate,
    log_decay,
    log_decay_slope,
    narrow,
    store_rows,
    store_scalars,
    strictly_lower,
    through_norm,
)


@triton.jit
def key_gradients_kernel(
    q, k, v, g, factors, states, grad_states, U, R, do, dG_read, A_log, dt_bias,
    dk, dv, dg, dbeta, dA_log, ddt_bias, cu_seqlens,
    scale, N, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, L2: tl.constexpr,
    GATE: tl.constexpr, BIAS: tl.constexpr, SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot, kh = program // H, program % H
    start, count = locate(slot, cu_seqlens, N, T, NT, VARLEN, C)
    if count <= 0:
        return
    dtype: tl.constexpr = q.dtype.element_ty
    live = tl.arange(0, C) < count
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    norm_q = load_factor(factors, slot * HV + kh * (HV // H), NORM_Q, C)
    norm_k = load_factor(factors, slot * HV + kh * (HV // H), NORM_K, C)
    grad_k = tl.zeros([C, BK], tl.float32)
    from_q = tl.zeros([C, C], tl.float32)  # sums over the value heads: of (dP * L)^T, and of D
    from_k = tl.zeros([C, C], tl.float32)
    for group in range(HV // H):
        head = kh * (HV // H) + group
        block = slot * HV + head
        decay = load_factor(factors, block, LOG_DECAY, C)
        strength = load_factor(factors, block, STRENGTH, C)
        total = tl.load(factors + (block * FACTORS + LOG_DECAY) * C + C - 1)

        # what the update read: the state before the chunk, and through A the chunk itself
        RU = tl.zeros([C, C], tl.float32)
        inter = tl.zeros([C, BK], tl.float32)
        grad_beta = tl.zeros([C], tl.float32)
        for first in range(0, V, BV):
            rest = tl.trans(load_matrix(R, block, first, V, BV, C))
            inter += dot(rest, load_state(states, block, first, K, V, BK, BV))
            RU += dot(rest, load_matrix(U, block, first, V, BV, C))
            values = load_rows(v, start, count, head, HV, V, first, C, BV).to(tl.float32)
            grad_beta += tl.sum(rest.to(tl.float32) * values, axis=1)
            grad_v = strength[:, None] * rest.to(tl.float32)
            store_rows(dv, grad_v, start, count, head, HV, V, first, C, BV)
        keys = load_rows(k, start, count, kh, H, K, 0, C, BK)
        inter *= tl.exp(decay)[:, None]
        read = norm_k * tl.sum(keys.to(tl.float32) * inter, axis=1)
        grad_k -= strength[:, None] * inter
        G = load_sums(factors, block, C, dtype)
        L = decay_matrix(G, C)
        along_U = tl.sum(tl.where(row == column, RU, 0.0), axis=1)
        RU = strictly_lower(RU * L, C)
        from_k -= strength[:, None] * RU
        RU *= norm_k[:, None] * norm_k[None, :] * dot(keys, tl.trans(keys))
        grad_beta -= read + tl.sum(RU, axis=1)
        # the same from U, which is rounded once; not where beta is too weak to divide by
        grad_beta = tl.where(strength > 0.0625, along_U / tl.maximum(strength, 0.0625), grad_beta)
        dL = strength[:, None] * RU
        dG = tl.load(dG_read + block * C + tl.arange(0, C)) - strength * read
        dG -= tl.sum(dL, axis=1) - tl.sum(dL, axis=0)

        # what the state after the chunk took up, and o through P
        inter = tl.zeros([C, BK], tl.float32)
        turned_dP = tl.zeros([C, C], tl.float32)
        carried = 0.0
        for first in range(0, V, BV):
            dS = load_state(grad_states, block, first, K, V, BK, BV)
            written = tl.trans(load_matrix(U, block, first, V, BV, C))
            inter += dot(written, dS)
            grad_o = load_rows(do, start, count, head, HV, V, first, C, BV)
            turned_dP += dot(written, tl.trans(grad_o))
            S = load_state(states, block, first, K, V, BK, BV).to(tl.float32)
            carried += tl.sum(S * dS.to(tl.float32))
        inter *= tl.exp((last_of(G, C) - G).to(tl.float32))[:, None]
        grad_k += inter
        keys = load_rows(k, start, count, kh, H, K, 0, C, BK)
        written = norm_k * tl.sum(keys.to(tl.float32) * inter, axis=1)
        later = (G[None, :] - G[:, None]).to(tl.float32)
        from_q += turned_dP * tl.exp(tl.where(row <= column, later, -float("inf")))

        # all of dG from t on, what token j < t wrote, and the state that crosses the chunk
        dg_t = tl.cumsum(dG, axis=0, reverse=True)
        # the written ones summed under a mask: an inclusive sum less its last term would cancel
        dg_t += tl.sum(tl.where(row > column, written[None, :], 0.0), axis=1)
        dg_t += tl.exp(total) * carried
        raw = load_scalars(g, start, count, head, HV, C)
        step = raw
        if GATE:
            if BIAS:
                raw += tl.load(dt_bias + head).to(tl.float32)
            rate = tl.load(A_log + head).to(tl.float32)
            step = log_decay(raw, rate)
        reset = step <= FLOOR  # where prepare has clamped
        dg_t = tl.where(live & ~reset, dg_t, 0.0)
        if GATE:
            tl.store(dA_log + block, tl.sum(tl.where(reset, 0.0, step * dg_t)))
            dg_t = tl.where(reset, 0.0, dg_t * log_decay_slope(raw, rate))
            if BIAS:
                tl.store(ddt_bias + block, tl.sum(dg_t))
        if SIGMOID:
            grad_beta *= strength * (1 - strength / BETA_SCALE)
        store_scalars(dg, dg_t, start, count, head, HV, C)
        store_scalars(dbeta, grad_beta, start, count, head, HV, C)

    queries = load_rows(q, start, count, kh, H, K, 0, C, BK)
    grad_k += dot(narrow(scale * from_q * norm_q[None, :], dtype), queries)
    keys = load_rows(k, start, count, kh, H, K, 0, C, BK)
    both = (from_k + tl.trans(from_k)) * norm_k[None, :]
    grad_k += dot(narrow(both, dtype), keys)
    if L2:
        grad_k = through_norm(grad_k, keys.to(tl.float32), norm_k)
    store_rows(dk, grad_k, start, count, kh, H, K, 0, C, BK)
