"""One chunk of C tokens, forward and backward, for all sequences and heads at once.

With S the state before the chunk and S' after it, G the cumulative sum of g in the chunk,
gamma = G_last, and L_ij = exp(G_i - G_j) for i >= j:

    M = tril(beta_i L_ij k_i.k_j, -1)        P = scale tril(L_ij q_i.k_j)
    E = V - e^G * (K S)                      U = (I + M)^-1 (beta * E)
    O = scale e^G * (Q S) + P U              S' = e^gamma S + K^T (e^{gamma - G} * U)

This is the chunked form of the recurrence in `gdn.definition`. The HV / H value heads of a q/k
head are its group. They share q and k, and lie side by side in the columns of V. So one product
with K or Q serves the whole group, and a product with K^T or Q^T sums over it.

Shapes, for m sequences: q, k [m, H, C, K]; v, o [m, H, C, group V]; g, beta [m, H, group, C];
S [m, H, K, group V].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """The activated inputs of a chunk in the compute dtype, the dtype to which matrix products
    round their operands, and whether (I + M)^-1 is such an operand."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float
    operand_dtype: torch.dtype
    rounds_inverse: bool


class ChunkGradients(NamedTuple):
    """Gradients of q, k, v, g, beta and of the state before the chunk, in their shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor


class _Intermediates(NamedTuple):
    """What forward and backward both compute."""

    kq: Tensor  # k above q, [m, H, 2 C, K]
    exp_G: Tensor  # e^G, [m, H, group, C, 1]
    decay_to_end: Tensor  # e^{gamma - G}, [m, H, group, C, 1]
    chunk_decay: Tensor  # e^gamma, [m, H, group]
    L: Tensor  # [m, H, group, C, C], zero above the diagonal
    kk: Tensor  # k_i.k_j, [m, H, 1, C, C]
    M: Tensor  # [m, H, group, C, C], zero above the diagonal; the diagonal is not used
    P: Tensor  # [m, H, group, C, C]
    decayed_KS: Tensor  # e^G * (K S), [m, H, group, C, V]
    decayed_QS: Tensor  # scale e^G * (Q S), [m, H, group, C, V]
    E: Tensor  # [m, H, group, C, V]
    U: Tensor  # [m, H, group, C, V]


def multiply(a: Tensor, b: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """a @ b with the operands rounded to operand_dtype, summed in the dtype of a and b."""
    if operand_dtype == a.dtype:
        return a @ b
    if operand_dtype == torch.float16:
        (a, a_scale), (b, b_scale) = _into_range(a), _into_range(b)
        return a_scale * b_scale * _multiply_rounded(a, b, operand_dtype)
    return _multiply_rounded(a, b, operand_dtype)


def _into_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices x over a power of two each, so that elements fit into float16, and these powers.
    They are 1 for elements below 2^15."""
    exponents = torch.frexp(x.abs().amax((-2, -1), keepdim=True)).exponent
    scale = torch.ldexp(torch.ones_like(x[..., :1, :1]), (exponents - 15).clamp(min=0))
    return x / scale, scale


def _multiply_rounded(a: Tensor, b: Tensor, operand_dtype: torch.dtype) -> Tensor:
    a, b, dtype = a.to(operand_dtype), b.to(operand_dtype), a.dtype
    if a.device.type == "cuda":
        product: Tensor = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=dtype)
        return product.view(*a.shape[:-1], -1)
    return a.to(dtype) @ b.to(dtype)


def solve(M: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
    """(I + M)^-1 x, or (I + M)^-T x. Reads only the entries of M below the diagonal."""
    # solved from the right for x^T, the result is row-major, which saves two transposed copies
    A = M if transpose else M.mT
    solved: Tensor = torch.linalg.solve_triangular(
        A, x.mT, upper=not transpose, left=False, unitriangular=True
    )
    return solved.mT


def apply_inverse(chunk: Chunk, M: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
    """`solve`, or with rounds_inverse a product with the inverse, as in kernels."""
    if not chunk.rounds_inverse:
        return solve(M, x, transpose)
    A = solve(M, torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M))
    return multiply(A.mT if transpose else A, x, chunk.operand_dtype)


def split_group(x: Tensor, group: int) -> Tensor:
    """[m, H, C, group V] -> [m, H, group, C, V]."""
    return x.view(*x.shape[:3], group, -1).transpose(2, 3)


def join_group(x: Tensor) -> Tensor:
    """[m, H, group, C, V] -> [m, H, C, group V]."""
    return x.transpose(2, 3).flatten(-2)


def _compute_intermediates(chunk: Chunk, S: Tensor) -> _Intermediates:
    q, k, v, g, beta, scale, operand_dtype, _ = chunk
    group, C = g.shape[2:]
    above_diagonal = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
    # float64, since G_i - G_j of float32 sums would be the largest rounding error; MPS has none
    G = g.cumsum(-1, dtype=g.dtype if g.device.type == "mps" else torch.float64)
    chunk_decay = G[..., -1].exp().to(g)
    decay_to_end = (G[..., -1:] - G).to(g).exp_()[..., None]
    exp_G = G.exp().to(g)[..., None]
    L = (G[..., :, None] - G[..., None, :]).to(g).masked_fill_(above_diagonal, -torch.inf).exp_()

    kq = torch.cat([k, q], 2)
    kk, qk = multiply(kq, k.mT, operand_dtype)[:, :, None].chunk(2, -2)
    KS, QS = multiply(kq, S, operand_dtype).chunk(2, -2)
    decayed_KS = split_group(KS, group) * exp_G
    decayed_QS = split_group(QS, group) * (scale * exp_G)
    del KS, QS  # for less peak memory
    M = L * kk
    M *= beta[..., None]
    P = L * (scale * qk)
    E = split_group(v, group) - decayed_KS
    U = apply_inverse(chunk, M, beta[..., None] * E)
    return _Intermediates(
        kq, exp_G, decay_to_end, chunk_decay, L, kk, M, P, decayed_KS, decayed_QS, E, U
    )


def _decay_state(chunk_decay: Tensor, S: Tensor) -> Tensor:
    """e^gamma S for chunk_decay [m, H, group], S [m, H, K, group V]."""
    by_head = S.view(*S.shape[:3], chunk_decay.shape[-1], -1)
    return (by_head * chunk_decay[:, :, None, :, None]).flatten(-2)


def chunk_forward(chunk: Chunk, S: Tensor) -> tuple[Tensor, Tensor]:
    """o of the chunk and the state after it."""
    x = _compute_intermediates(chunk, S)
    o = x.decayed_QS + multiply(x.P, x.U, chunk.operand_dtype)
    update = multiply(chunk.k.mT, join_group(x.decay_to_end * x.U), chunk.operand_dtype)
    return join_group(o), _decay_state(x.chunk_decay, S).add_(update)


def chunk_backward(chunk: Chunk, S: Tensor, grad_o: Tensor, grad_S: Tensor) -> ChunkGradients:
    """Gradients of a chunk from those of its o and of the state after it, grad_S. Forward's values
    are computed again.

    dX is the gradient of X. By the equations above, with * elementwise:

        dU = P^T dO + e^{gamma - G} * (K dS')    R = (I + M)^-T dU              dV = beta * R
        dP = tril(dO U^T)                        dM = -tril(R U^T, -1)
        dQ = scale e^G * (dO S^T) + scale (dP * L) K
        dK = -(e^G * dV) S^T + e^{gamma - G} * (U dS'^T) + scale (dP * L)^T Q + (D + D^T) K
        dS = e^gamma dS' + Q^T (scale e^G * dO) - K^T (e^G * dV)

    with D = beta * dM * L. dg_t is the sum of gradient times value over the factors that contain
    g_t: e^{G_i} for i >= t, e^{G_i - G_j} for i >= t > j, e^{gamma - G_j} for t > j, and e^gamma.
    """
    k, beta, scale, operand_dtype = chunk.k, chunk.beta, chunk.scale, chunk.operand_dtype
    group = beta.shape[2]
    x = _compute_intermediates(chunk, S)
    dO = split_group(grad_o, group)  # [m, H, group, C, V]

    decayed_KdS = split_group(multiply(k, grad_S, operand_dtype), group) * x.decay_to_end
    dU = multiply(x.P.mT, dO, operand_dtype) + decayed_KdS
    R = apply_inverse(chunk, x.M, dU, transpose=True)
    dP, dM = multiply(torch.cat([dO, -R], -2), x.U.mT, operand_dtype).chunk(2, -2)
    # dL * L. On the diagonal L is 1 for any G, and the terms of dG would only cancel up to rounding
    dL_L = (dP * x.P + dM * x.M).tril_(-1)
    dP_L, dM_L = dP * x.L, (dM * x.L).tril_(-1)  # gradients of scale q_i.k_j and of beta_i k_i.k_j
    del dP, dM  # for less peak memory
    dV = beta[..., None] * R

    # K S and Q S share S, and their gradients one product
    dKS_dQS = torch.cat([join_group(-x.exp_G * dV), join_group(scale * x.exp_G * dO)], 2)
    dK, dQ = multiply(dKS_dQS, S.mT, operand_dtype).chunk(2, 2)
    dS = _decay_state(x.chunk_decay, grad_S).add_(multiply(x.kq.mT, dKS_dQS, operand_dtype))
    dK = dK + multiply(join_group(x.decay_to_end * x.U), grad_S.mT, operand_dtype)
    dqk = scale * dP_L.sum(2)  # [m, H, C, C], the gradient of q_i.k_j
    D = (beta[..., None] * dM_L).sum(2)  # [m, H, C, C], the gradient of k_i.k_j
    dQ = dQ + multiply(dqk, k, operand_dtype)
    dK += multiply(torch.cat([D + D.mT, dqk.mT], -1), x.kq, operand_dtype)

    dbeta = (R * x.E).sum(-1) + (dM_L * x.kk).sum(-1)
    U_dot_KdS = (x.U * decayed_KdS).sum(-1)  # [m, H, group, C]
    S_dot_dS = (S * grad_S).view(*S.shape[:3], group, -1).sum((2, 4))  # [m, H, group]
    dG = dL_L.sum(-1) - dL_L.sum(-2) + (dO * x.decayed_QS - dV * x.decayed_KS).sum(-1)
    dg = dG.flip(-1).cumsum(-1).flip(-1) + (x.chunk_decay * S_dot_dS)[..., None]
    dg[..., 1:] += U_dot_KdS.cumsum(-1)[..., :-1]
    return ChunkGradients(dQ, dK, join_group(dV), dg, dbeta, dS)
