"""One chunk of C tokens with a decay per channel, forward and backward, for all sequences and heads
at once.

With S the state before the chunk and S' after it, prefix_i the product of e^g from the chunk's
start to token i, suffix_j that from after token j to its end, gamma the product of all, and pairs
as in `channel_decay.py`:

    M = beta_i pairs(K, K)                     P = scale (pairs(Q, K) + diag(q_i.k_i))
    E = V - (prefix * K) S                     U = (I + M)^-1 (beta * E)
    O = scale (prefix * Q) S + P U             S' = gamma * S + (suffix * K)^T U

This is the chunked form of the recurrence in `gdn.definition`, where * with gamma scales the rows
of S. Chunks are padded to a power of two with tokens that change nothing.

Shapes as in `chunk.py`, except g [m, H, group, C, K]. Each value head has its own products with Q
and K, since its decays are its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .channel_decay import Decays
from .chunk import Chunk, ChunkGradients, apply_inverse, join_group, multiply, split_group


class _Intermediates(NamedTuple):
    """What forward and backward both compute, each [m, H, group, ...]."""

    q: Tensor  # scale Q, [m, H, 1, C, K]
    k: Tensor  # [m, H, 1, C, K]
    S: Tensor  # [.., K, V]
    decays: Decays
    q_in: Tensor  # scale prefix * Q, [.., C, K]
    k_in: Tensor  # prefix * K, [.., C, K]
    k_out: Tensor  # suffix * K, [.., C, K]
    kk: Tensor  # pairs(K, K), [.., C, C]
    M: Tensor  # [.., C, C]
    P: Tensor  # [.., C, C]
    E: Tensor  # [.., C, V]
    U: Tensor  # [.., C, V]


def _pad(chunk: Chunk) -> tuple[Chunk, int]:
    """The chunk padded to a power of two, and the number of tokens added."""
    C = chunk.q.shape[2]
    more = (1 << (C - 1).bit_length()) - C
    if not more:
        return chunk, 0
    q, k, v, g = (F.pad(x, (0, 0, 0, more)) for x in chunk[:4])
    return chunk._replace(q=q, k=k, v=v, g=g, beta=F.pad(chunk.beta, (0, more))), more


def _compute_intermediates(chunk: Chunk, S: Tensor) -> _Intermediates:
    operand_dtype, group = chunk.operand_dtype, chunk.beta.shape[2]
    q, k = (chunk.scale * chunk.q)[:, :, None], chunk.k[:, :, None]
    S = split_group(S, group)
    decays = Decays(chunk.g.exp())
    q_in, k_in, k_out = q * decays.prefix, k * decays.prefix, k * decays.suffix
    kk, P = (decays.pairs(x, k, operand_dtype) for x in (k, q))
    P.diagonal(0, -2, -1).copy_((q * k).sum(-1))
    M = kk * chunk.beta[..., None]
    E = split_group(chunk.v, group) - multiply(k_in, S, operand_dtype)
    U = apply_inverse(chunk, M, chunk.beta[..., None] * E)
    return _Intermediates(q, k, S, decays, q_in, k_in, k_out, kk, M, P, E, U)


def chunk_forward(chunk: Chunk, S: Tensor) -> tuple[Tensor, Tensor]:
    """o of the chunk and the state after it."""
    tokens = chunk.q.shape[2]
    chunk, _ = _pad(chunk)
    x = _compute_intermediates(chunk, S)
    o = multiply(x.q_in, x.S, chunk.operand_dtype) + multiply(x.P, x.U, chunk.operand_dtype)
    update = multiply(x.k_out.mT, x.U, chunk.operand_dtype)
    after = update.addcmul_(x.decays.prefix[..., -1, :, None], x.S)
    return join_group(o[..., :tokens, :]), join_group(after)


def chunk_backward(chunk: Chunk, S: Tensor, grad_o: Tensor, grad_S: Tensor) -> ChunkGradients:
    """Gradients of a chunk from those of its o and of the state after it, grad_S. Forward's values
    are computed again.

    dX is the gradient of X. By the equations above, with * elementwise:

        dU = P^T dO + (suffix * K) dS'           R = (I + M)^-T dU              dV = beta * R
        dP = dO U^T                              dM = -R U^T
        dS = gamma * dS' + (scale prefix * Q)^T dO - (prefix * K)^T dV

    and dQ, dK and dg follow from the gradients of prefix * Q, prefix * K, suffix * K and of both
    pairs.
    """
    tokens, group, operand_dtype = chunk.q.shape[2], chunk.beta.shape[2], chunk.operand_dtype
    chunk, more = _pad(chunk)
    x = _compute_intermediates(chunk, S)
    prefix, suffix, beta = x.decays.prefix, x.decays.suffix, chunk.beta[..., None]
    gamma = prefix[..., -1, :, None]
    dO, dS_after = split_group(F.pad(grad_o, (0, 0, 0, more)), group), split_group(grad_S, group)

    dU = multiply(x.P.mT, dO, operand_dtype) + multiply(x.k_out, dS_after, operand_dtype)
    R = apply_inverse(chunk, x.M, dU, transpose=True)
    dV = beta * R
    dP = multiply(dO, x.U.mT, operand_dtype)
    dM = -multiply(R, x.U.mT, operand_dtype)
    dbeta = (R * x.E).sum(-1) + (dM * x.kk).sum(-1)

    dS = gamma * dS_after
    dS += multiply(x.q_in.mT, dO, operand_dtype)
    dS -= multiply(x.k_in.mT, dV, operand_dtype)
    dq = multiply(dO, x.S.mT, operand_dtype).mul_(prefix)
    dk = multiply(dV, x.S.mT, operand_dtype).mul_(prefix).neg_()
    dk_out = multiply(x.U, dS_after.mT, operand_dtype).mul_(suffix)
    at_prefix, at_suffix = (x.q * dq).addcmul_(x.k, dk), x.k * dk_out
    at_prefix[..., -1, :] += (gamma * x.S * dS_after).sum(-1)
    dk += dk_out
    dP_diagonal = dP.diagonal(0, -2, -1)[..., None]  # a token reads itself without decay
    dq.addcmul_(dP_diagonal, x.k)
    dk.addcmul_(dP_diagonal, x.q)
    dg = x.decays.backpropagate(
        x.q, x.k, dP, beta * dM, (dq, dk), at_prefix, at_suffix, operand_dtype
    )
    return ChunkGradients(
        chunk.scale * dq.sum(2)[..., :tokens, :],
        dk.sum(2)[..., :tokens, :],
        join_group(dV[..., :tokens, :]),
        dg[..., :tokens, :],
        dbeta[..., :tokens],
        join_group(dS),
    )
