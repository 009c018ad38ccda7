"""One chunk of C tokens, forward and backward, for all sequences and heads at once.

With S the state before the chunk, G the in-chunk cumulative sum of g, gamma = G_last and
L_ij = exp(G_i - G_j) for i >= j:

    M = tril(beta_i L_ij k_i.k_j, -1)        P = scale tril(L_ij q_i.k_j)
    E = V - e^G * (K S)                      U = (I + M)^-1 (beta * E)
    O = scale e^G * (Q S) + P U              S' = e^gamma S + K^T (e^{gamma - G} * U)

which is the chunked form of the recurrence in gdn.definition. The G value heads of one q/k head lie
side by side in the columns of V, so that products with K or Q serve them all at once, and their
transposes sum over them.

Shapes: q, k [m, H, C, K]; v, o [m, H, C, G V]; g, beta [m, H, G, C]; S [m, H, K, G V].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """The activated inputs of one chunk, in the compute dtype; `operands` is what matrix products
    round to."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float
    operands: torch.dtype


class ChunkGradients(NamedTuple):
    """Gradients of q, k, v, g, beta and of the state before the chunk, shaped like them."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor


class _Parts(NamedTuple):
    """What forward and backward both need; per value head: [m, H, G, C, ...]."""

    kq: Tensor  # [m, H, 2 C, K]
    decay: Tensor  # e^G, [m, H, G, C, 1]
    to_end: Tensor  # e^{gamma - G}, [m, H, G, C, 1]
    total: Tensor  # e^gamma, [m, H, G]
    L: Tensor  # [m, H, G, C, C], zero above the diagonal
    kk: Tensor  # [m, H, 1, C, C]
    M: Tensor  # [m, H, G, C, C], zero above the diagonal; its diagonal is meaningless
    P: Tensor  # [m, H, G, C, C]
    KS: Tensor  # e^G * (K S), [m, H, G, C, V]
    QS: Tensor  # scale e^G * (Q S), [m, H, G, C, V]
    E: Tensor  # [m, H, G, C, V]
    U: Tensor  # [m, H, G, C, V]


def product(a: Tensor, b: Tensor, operands: torch.dtype) -> Tensor:
    """a @ b with the operands rounded to `operands` and the sum kept in the dtype of a and b."""
    if operands == a.dtype:
        return a @ b
    a, b, dtype = a.to(operands), b.to(operands), a.dtype
    if a.device.type == "cuda":
        wide: Tensor = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=dtype)
        return wide.view(*a.shape[:-1], -1)
    return a.to(dtype) @ b.to(dtype)


def solve(M: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
    """(I + M)^-1 x, or (I + M)^-T x; only what lies strictly below M's diagonal is read."""
    # solving for x^T from the right leaves x row-major, which spares two transposed copies
    A = M if transpose else M.mT
    solved: Tensor = torch.linalg.solve_triangular(
        A, x.mT, upper=not transpose, left=False, unitriangular=True
    )
    return solved.mT


def split_heads(x: Tensor, groups: int) -> Tensor:
    """[m, H, C, G V] -> [m, H, G, C, V]."""
    return x.view(*x.shape[:3], groups, -1).transpose(2, 3)


def join_heads(x: Tensor) -> Tensor:
    """[m, H, G, C, V] -> [m, H, C, G V]."""
    return x.transpose(2, 3).flatten(-2)


def _parts(chunk: Chunk, S: Tensor) -> _Parts:
    q, k, v, g, beta, scale, operands = chunk
    groups, C = g.shape[2:]
    above = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
    # nothing else rounds as much as G_i - G_j does if both are float32 sums of many gates
    G = g.cumsum(-1, dtype=g.dtype if g.device.type == "mps" else torch.float64)
    total, to_end = G[..., -1].exp().to(g), (G[..., -1:] - G).to(g).exp_()[..., None]
    decay = G.exp().to(g)[..., None]
    L = (G[..., :, None] - G[..., None, :]).to(g).masked_fill_(above, -torch.inf).exp_()

    kq = torch.cat([k, q], 2)
    kk, qk = product(kq, k.mT, operands)[:, :, None].chunk(2, -2)
    KS, QS = product(kq, S, operands).chunk(2, -2)
    KS, QS = split_heads(KS, groups) * decay, split_heads(QS, groups) * (scale * decay)
    M = L * kk
    M *= beta[..., None]
    P = L * (scale * qk)
    E = split_heads(v, groups) - KS
    U = solve(M, beta[..., None] * E)
    return _Parts(kq, decay, to_end, total, L, kk, M, P, KS, QS, E, U)


def _decay_state(total: Tensor, S: Tensor) -> Tensor:
    """e^gamma S for total [m, H, G], S [m, H, K, G V]."""
    return (S.view(*S.shape[:3], total.shape[-1], -1) * total[:, :, None, :, None]).flatten(-2)


def chunk_forward(chunk: Chunk, S: Tensor) -> tuple[Tensor, Tensor]:
    """o of the chunk and the state after it."""
    p = _parts(chunk, S)
    o = p.QS + product(p.P, p.U, chunk.operands)
    update = product(chunk.k.mT, join_heads(p.to_end * p.U), chunk.operands)
    return join_heads(o), _decay_state(p.total, S).add_(update)


def chunk_backward(chunk: Chunk, S: Tensor, grad_o: Tensor, grad_S: Tensor) -> ChunkGradients:
    """Gradients of one chunk from those of its o and of the state after it; forward is computed
    again.

    Write dX for the gradient of X. By the equations above, with rows as tokens and * elementwise:

        dU = P^T dO + e^{gamma-G} * (K dS')      dR = (I + M)^-T dU             dV = beta * dR
        dP = tril(dO U^T)                        dM = -tril(dR U^T, -1)
        dQ = scale e^G * (dO S^T) + scale (dP * L) K
        dK = -(e^G * dV) S^T + e^{gamma-G} * (U dS'^T) + scale (dP * L)^T Q + (D + D^T) K
        dS = e^gamma dS' + Q^T (scale e^G * dO) - K^T (e^G * dV)

    with D = beta * dM * L. g_t scales what crosses token t: dg_t sums gradient times value over the
    factors e^{G_i} with i >= t, e^{G_i - G_j} with i >= t > j, e^{gamma - G_j} with t > j, e^gamma.
    """
    k, beta, scale, operands = chunk.k, chunk.beta, chunk.scale, chunk.operands
    groups = beta.shape[2]
    p = _parts(chunk, S)
    dO = split_heads(grad_o, groups)

    into_state = split_heads(product(k, grad_S, operands), groups) * p.to_end
    dU = product(p.P.mT, dO, operands) + into_state
    dR = solve(p.M, dU, transpose=True)
    dP, dM = product(torch.cat([dO, -dR], -2), p.U.mT, operands).chunk(2, -2)
    # times L; its diagonal is 1 whatever G is, and would only cancel below, with a rounding error
    dL = (dP * p.P + dM * p.M).tril_(-1)
    dP, dM = dP * p.L, (dM * p.L).tril_(-1)  # now gradients of scale q.k and of beta k.k
    dV = beta[..., None] * dR

    columns = torch.cat([join_heads(-p.decay * dV), join_heads(scale * p.decay * dO)], 2)
    dK, dQ = product(columns, S.mT, operands).chunk(2, 2)
    dS = _decay_state(p.total, grad_S).add_(product(p.kq.mT, columns, operands))
    dK = dK + product(join_heads(p.to_end * p.U), grad_S.mT, operands)
    from_qk = scale * dP.sum(2)
    from_kk = (beta[..., None] * dM).sum(2)
    dQ = dQ + product(from_qk, k, operands)
    dK += product(torch.cat([from_kk + from_kk.mT, from_qk.mT], -1), p.kq, operands)

    dbeta = (dR * p.E).sum(-1) + (dM * p.kk).sum(-1)
    written = (p.U * into_state).sum(-1)
    carried = (S * grad_S).view(*S.shape[:3], groups, -1).sum((2, 4))
    dG = dL.sum(-1) - dL.sum(-2) + (dO * p.QS - dV * p.KS).sum(-1)
    dg = dG.flip(-1).cumsum(-1).flip(-1) + (p.total * carried)[..., None]
    dg[..., 1:] += written.cumsum(-1)[..., :-1]
    return ChunkGradients(dQ, dK, join_heads(dV), dg, dbeta, dS)
