"""Decays by channel over blocks of tokens, and dot products of tokens that decay on the way.

A token i reads what token j wrote after the decays of t = j + 1 .. i, each channel by itself:

    pairs(x, k)_ij = sum_c x_ic k_jc prod_{j < t <= i} a_tc,    a = e^g, i > j

The C tokens of a chunk form a binary tree of blocks. A block of 2 h tokens has a left and a right
half, and every pair i > j lies in different halves of exactly one block. There

    prod_{j < t <= i} a_t = prefix_i suffix_j,    prefix_i = product over the right half up to i,
                                                  suffix_j = product over the left half after j

so a matrix product of h x K by K x h gives all pairs of the block. The prefixes and suffixes of a
block follow from those of its halves by one multiplication. Nothing is divided, and no sums of g
are subtracted: the form holds for every g <= 0, -inf included. All factors are at most 1, and one
underflows only where the true product is smaller still.

The gradient of g goes back through the same tree. Each factor f has the number f df, the sum of
gradient times value over its uses, and dg_t is the sum of these over the factors that contain a_t.
Pairs that do not contain a_t never enter dg_t, so there is nothing to cancel.

Shapes: q, k [m, H, 1 or group, C, K]; a and dg [m, H, group, C, K]; C a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk import multiply


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """Views of the left and the right halves of the blocks of 2 h tokens: from [..., C, K], twice
    [..., C / (2 h), h, K]."""
    left, right = x.view(*x.shape[:-2], -1, 2, h, x.shape[-1]).unbind(-3)
    return left, right


def _tiles(x: Tensor, h: int) -> Tensor:
    """A view of each block's rows of the right half and columns of the left half: from
    [..., C, C], [..., C / (2 h), h, h]."""
    n = x.shape[-1] // (2 * h)
    grid = x.view(*x.shape[:-2], n, 2 * h, n, 2 * h)
    return grid.diagonal(0, -4, -2).movedim(-1, -3)[..., h:, :h]


class Decays:
    """The factors of a chunk.

    `prefix` and `suffix` [m, H, group, C, K] are those of the whole chunk: the decay from its start
    to each token, and from each token to its end. `levels` holds, for h = 1, 2, .. C / 2, the
    prefixes of the right halves and the suffixes of the left halves of all blocks,
    [m, H, group, C / (2 h), h, K] each.
    """

    def __init__(self, a: Tensor) -> None:
        self.prefix, self.suffix = a.clone(), torch.ones_like(a)
        self.levels: list[tuple[Tensor, Tensor]] = []
        h = 1
        while h < a.shape[-2]:
            prefix_left, prefix_right = halves(self.prefix, h)
            suffix_left, _ = halves(self.suffix, h)
            self.levels.append((prefix_right.clone(), suffix_left.clone()))
            suffix_left *= prefix_right[..., -1:, :]
            prefix_right *= prefix_left[..., -1:, :]
            h *= 2

    def pairs(self, x: Tensor, k: Tensor, operand_dtype: torch.dtype) -> Tensor:
        """pairs(x, k) [m, H, group, C, C], zero on the diagonal and above it."""
        C = x.shape[-2]
        out = x.new_zeros(*self.prefix.shape[:-2], C, C)
        for prefix, suffix in self.levels:
            h = prefix.shape[-2]
            right, left = halves(x, h)[1] * prefix, halves(k, h)[0] * suffix
            _tiles(out, h).copy_(multiply(right, left.mT, operand_dtype))
        return out

    def backpropagate(
        self,
        q: Tensor,
        k: Tensor,
        dqk: Tensor,
        dkk: Tensor,
        into: tuple[Tensor, Tensor],
        at_prefix: Tensor,
        at_suffix: Tensor,
        operand_dtype: torch.dtype,
    ) -> Tensor:
        """dg, from the gradients dqk and dkk of pairs(q, k) and pairs(k, k), read below the
        diagonal.

        Adds the gradients of q and k to the tensors `into` [m, H, group, C, K]. at_prefix and
        at_suffix [m, H, group, C, K] hold f df of the whole chunk's factors, from their uses
        elsewhere; they are overwritten.
        """
        for prefix, suffix in reversed(self.levels):
            h = prefix.shape[-2]
            at_left, at_right = halves(at_prefix, h)
            at_suffix_left, _ = halves(at_suffix, h)
            # block's prefix_i = prefix_i times the left half's product, for i in the right half
            at_left[..., -1, :] += at_right.sum(-2)
            # block's suffix_j = suffix_j times the right half's product, for j in the left half
            at_right[..., -1, :] += at_suffix_left.sum(-2)

            (k_left, k_right), q_right = halves(k, h), halves(q, h)[1]
            dqk_tiles, dkk_tiles = _tiles(dqk, h), _tiles(dkk, h)
            left = k_left * suffix
            d_left = multiply(dqk_tiles.mT, q_right * prefix, operand_dtype)
            d_left += multiply(dkk_tiles.mT, k_right * prefix, operand_dtype)
            for x, total, tiles in ((q_right, into[0], dqk_tiles), (k_right, into[1], dkk_tiles)):
                dx = multiply(tiles, left, operand_dtype).mul_(prefix)
                halves(total, h)[1].add_(dx)
                at_right.addcmul_(x, dx)
            d_left *= suffix
            halves(into[1], h)[0].add_(d_left)
            at_suffix_left.addcmul_(k_left, d_left)
        return at_prefix  # blocks of one token: their prefix is a
