"""The last stage of backward, a program a chunk and q/k head: every gradient of the chunk.

U, R, S (the state before) and dS (the gradient of the state after) are as the scans left them; dV
is beta * R; rows are tokens. With * elementwise, W = tril(L_ij k_i.k_j, -1) and dP = tril(dO U^T),
for each value head

    dQ = scale e^G * (dO S^T) + scale (dP * L) K
    dK = e^{gamma - G} * (U dS^T) - e^G * (dV S^T) + scale (dP * L)^T Q + (D + D^T) K
    D = -beta * tril(L * (R U^T), -1)
    dbeta = rowsum(R * V) - rowsum(e^G * K * (R S^T)) - rowsum(W * (R U^T))

dg_t sums gradient times value over the factors e^{G_i} with i >= t, e^{G_i - G_j} with i >= t > j,
e^{gamma - G_j} with t > j, and e^gamma. dQ and dK are summed over the value heads of the q/k head
in float32, in order, so that runs are bit-equal. Then follow the gradients through the L2 norm, the
sigmoid and the gate.

Reads q, k, v, g, beta, G, dO, U, R and both states; writes dq, dk, dv (over R), dg, dbeta, and for
the gate's parameters one partial sum a chunk.
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
    load_scalars,
    locate,
    narrow,
    reciprocal_norm,
    store_rows,
    store_scalars,
    strictly_lower,
)


@triton.jit
def load_turned_state(
    states, block, first, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """[BV, BK]: the transpose of a block of columns of a state [K, V]."""
    i, j = first + tl.arange(0, BV)[:, None], tl.arange(0, BK)[None, :]
    at = states + block * (K * V) + j * V + i
    return tl.load(at, mask=(i < V) & (j < K), other=0.0)


@triton.jit
def through_norm(grad, x, r, L2: tl.constexpr):
    """The gradient of x given that of y = r x, r = 1 / sqrt(sum x^2 + eps)."""
    if L2:
        y = r[:, None] * x
        grad = r[:, None] * (grad - y * tl.sum(y * grad, axis=1)[:, None])
    return grad


@triton.jit
def gradients_kernel(
    q, k, v, g, beta_raw, G, beta, states, grad_states, U, R, do, A_log, dt_bias,
    dq, dk, dg, dbeta, dA_log, ddt_bias, scale,
    cu_seqlens, slot_sequence, slot_chunk, T, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, L2: tl.constexpr,
    GATE: tl.constexpr, BIAS: tl.constexpr, SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    slot, kh = program // H, program % H
    start, count = locate(slot, cu_seqlens, slot_sequence, slot_chunk, T, NT, VARLEN, C)
    if count <= 0:
        return
    dtype: tl.constexpr = q.dtype.element_ty
    live = tl.arange(0, C) < count
    queries = load_rows(q, start, count, kh, H, K, 0, C, BK)
    keys = load_rows(k, start, count, kh, H, K, 0, C, BK)
    turned = load_columns(k, start, count, kh, H, K, 0, C, BK)
    rq, rk = reciprocal_norm(queries, L2), reciprocal_norm(keys, L2)
    qk = scale * rq[:, None] * rk[None, :] * dot(queries, turned)
    kk = rk[:, None] * rk[None, :] * dot(keys, turned)
    wide_q, wide_k = queries.to(tl.float32), keys.to(tl.float32)
    grad_q = tl.zeros([C, BK], tl.float32)
    grad_k = tl.zeros([C, BK], tl.float32)
    from_qk = tl.zeros([C, C], tl.float32)  # sums over the value heads, of dP * L and of D
    from_kk = tl.zeros([C, C], tl.float32)

    for group in range(HV // H):
        head = kh * (HV // H) + group
        block = slot * HV + head
        decay, total = load_decay(G, start, count, head, HV, C)
        strength = load_scalars(beta, start, count, head, HV, C)
        L = decay_matrix(decay, C)

        dP = tl.zeros([C, C], tl.float32)
        inter = tl.zeros([C, BK], tl.float32)
        for first in range(0, V, BV):
            grad_o = load_rows(do, start, count, head, HV, V, first, C, BV)
            S = load_turned_state(states, block, first, K, V, BK, BV)
            inter += dot(grad_o, S)
            dP += dot(grad_o, load_columns(U, start, count, head, HV, V, first, C, BV))
        inter *= (scale * tl.exp(decay))[:, None]
        dG = rq * tl.sum(wide_q * inter, axis=1)
        grad_q += inter

        RU = tl.zeros([C, C], tl.float32)
        inter = tl.zeros([C, BK], tl.float32)
        grad_beta = tl.zeros([C], tl.float32)
        for first in range(0, V, BV):
            rest = load_rows(R, start, count, head, HV, V, first, C, BV)
            values = load_rows(v, start, count, head, HV, V, first, C, BV).to(tl.float32)
            S = load_turned_state(states, block, first, K, V, BK, BV)
            inter += dot(rest, S)
            RU += dot(rest, load_columns(U, start, count, head, HV, V, first, C, BV))
            grad_beta += tl.sum(rest.to(tl.float32) * values, axis=1)
            grad_v = strength[:, None] * rest.to(tl.float32)
            store_rows(R, grad_v, start, count, head, HV, V, first, C, BV)
        inter *= tl.exp(decay)[:, None]
        read = rk * tl.sum(wide_k * inter, axis=1)
        W = strictly_lower(L * kk, C)
        grad_beta -= read + tl.sum(W * RU, axis=1)
        dG -= strength * read
        grad_k -= strength[:, None] * inter

        inter = tl.zeros([C, BK], tl.float32)
        carried = 0.0
        for first in range(0, V, BV):
            S = load_turned_state(states, block, first, K, V, BK, BV).to(tl.float32)
            dS = load_turned_state(grad_states, block, first, K, V, BK, BV)
            inter += dot(load_rows(U, start, count, head, HV, V, first, C, BV), dS)
            carried += tl.sum(S * dS.to(tl.float32))
        inter *= tl.exp(total - decay)[:, None]
        written = rk * tl.sum(wide_k * inter, axis=1)
        grad_k += inter

        dL = strictly_lower(dP * L * qk, C) - strength[:, None] * W * RU
        dG += tl.sum(dL, axis=1) - tl.sum(dL, axis=0)
        from_qk += dP * L
        from_kk -= strictly_lower(strength[:, None] * L * RU, C)

        # all of dG from t on, what token j < t wrote, and the state that crosses the chunk
        dg_t = tl.cumsum(dG, axis=0, reverse=True)
        # the written ones summed under a mask: an inclusive sum less its last term would cancel
        row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        dg_t += tl.sum(tl.where(row > column, written[None, :], 0.0), axis=1)
        dg_t += tl.exp(total) * carried
        dg_t = tl.where(live, dg_t, 0.0)
        if GATE:
            raw = load_scalars(g, start, count, head, HV, C)
            if BIAS:
                raw += tl.load(dt_bias + head).to(tl.float32)
            rate = tl.exp(tl.load(A_log + head).to(tl.float32))
            steps = decay - tl.load(
                G + start * HV + head + (tl.arange(0, C) - 1) * HV,
                mask=live & (tl.arange(0, C) > 0), other=0.0,
            )  # fmt: skip
            tl.store(dA_log + block, tl.sum(tl.where(live, steps, 0.0) * dg_t))
            dg_t *= -rate * tl.sigmoid(raw)
            if BIAS:
                tl.store(ddt_bias + block, tl.sum(dg_t))
        if SIGMOID:
            grad_beta *= strength * (1 - strength / BETA_SCALE)
        store_scalars(dg, dg_t, start, count, head, HV, C)
        store_scalars(dbeta, grad_beta, start, count, head, HV, C)

    from_qk = scale * tl.where(tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :], from_qk, 0.0)
    both = from_kk + tl.trans(from_kk)
    grad_q += dot(narrow(from_qk * rk[None, :], dtype), keys)
    grad_k += dot(narrow(tl.trans(from_qk) * rq[None, :], dtype), queries)
    grad_k += dot(narrow(both * rk[None, :], dtype), keys)
    store_rows(dq, through_norm(grad_q, wide_q, rq, L2), start, count, kh, H, K, 0, C, BK)
    store_rows(dk, through_norm(grad_k, wide_k, rk, L2), start, count, kh, H, K, 0, C, BK)
