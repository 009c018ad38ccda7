"""Backward's products of pairs of tokens with a decay per channel.

With dP and F [C, C] of `matrix_gradients.py`, which hold dP^T and (beta F)^T above the diagonal,
for i > j, by the levels of `channel_decay.py`,

    dQ_i += sum_j dP_ij D_ij * K_j             dK_j += sum_i D_ij * (dP_ij Q_i + beta_i F_ij K_i)
    dK_i += beta_i sum_j F_ij D_ij * K_j

`terms` gets, for each product of these with a row of Q or K, that of i less that of j.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import LOG2_E, exp_flushed
from .channel_decay import (
    CENTRED_LEVEL,
    CENTRED_RANGE,
    LEVELS,
    block_pairs,
    dot_decayed,
    level_pairs,
    round_decayed,
)


@triton.jit
def to_middle(G, level, C: tl.constexpr, BD: tl.constexpr):
    """G_i - G_m in float32, [C, BD], m the last token of the left half of i's block at a level."""
    shift = LEVELS - 1 - level  # h = 1 << shift
    middle = (((tl.arange(0, C) >> shift) | 1) << shift) - 1
    return (G - tl.gather(G, tl.broadcast_to(middle[:, None], C, BD), axis=0)).to(tl.float32)


@triton.jit
def _add_levels(
    dQ, dK, terms, products, queries, keys, strength, dP, F, G, begin, end,
    C: tl.constexpr, BD: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """`add_pairs` of the levels from begin to end. A token in the right half of its block is an i,
    one in the left half a j."""
    for level in range(begin, end):
        f = exp_flushed(-tl.abs(to_middle(G, level, C, BD)))
        right = (tl.arange(0, C)[:, None] >> (LEVELS - 1 - level)) & 1 == 1
        pairs = level_pairs(level, C)
        k_f = round_decayed(keys * f, dtype)
        x_f = round_decayed(tl.where(right, queries, keys) * f, dtype)
        from_P = dot_decayed(tl.where(pairs, dP, 0.0), x_f, dtype)
        from_F = dot_decayed(tl.where(pairs, F, 0.0), k_f, dtype)
        dQ += tl.where(right, f * from_P, 0.0)
        dK += f * (tl.where(right, 0.0, from_P) + tl.where(right, strength[:, None], 1.0) * from_F)
        product = k_f.to(tl.float32) * from_F
        terms += tl.where(right, 1.0, -1.0) * x_f.to(tl.float32) * from_P
        terms += tl.where(right, strength[:, None], -1.0) * product
        products += tl.where(right, product, 0.0)
    return dQ, dK, terms, products


@triton.jit
def _add_centred(
    dQ, dK, terms, products, queries, keys, strength, dP, F, exponents, C: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """`add_pairs` of the blocks of CENTRED tokens. A token is an i of some pairs, a j of others."""
    of_i, of_j = exp_flushed(exponents), exp_flushed(-exponents)
    q_i, k_i = round_decayed(queries * of_i, dtype), round_decayed(keys * of_i, dtype)
    k_j = round_decayed(keys * of_j, dtype)
    pairs = block_pairs(CENTRED_LEVEL, C)
    lower = pairs & (tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :])
    upper = pairs & (tl.arange(0, C)[:, None] < tl.arange(0, C)[None, :])
    dQ_i = dot_decayed(tl.where(lower, dP, 0.0), k_j, dtype)
    dK_i = dot_decayed(tl.where(lower, F, 0.0), k_j, dtype)
    dK_j = dot_decayed(tl.where(upper, dP, 0.0), q_i, dtype)
    dK_j += dot_decayed(tl.where(upper, F, 0.0), k_i, dtype)
    product = k_i.to(tl.float32) * dK_i
    dQ += of_i * dQ_i
    dK += strength[:, None] * of_i * dK_i + of_j * dK_j
    terms += q_i.to(tl.float32) * dQ_i + strength[:, None] * product
    terms -= k_j.to(tl.float32) * dK_j
    return dQ, dK, terms, products + product


@triton.jit
def add_pairs(
    dQ, dK, terms, queries, keys, strength, dP, F, G, C: tl.constexpr,
    BD: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dQ, dK and terms [C, BD] with those of pairs, and rowsum(K * sum_j F_ij D_ij * K_j) [C], from
    normalised rows of q and k."""
    products = tl.zeros_like(terms)
    # factors of e^40 and e^-40 would cost float32 calls digits
    end: tl.constexpr = LEVELS if dtype == tl.float32 else CENTRED_LEVEL
    dQ, dK, terms, products = _add_levels(
        dQ, dK, terms, products, queries, keys, strength, dP, F, G, 0, end, C, BD, dtype
    )
    if dtype != tl.float32:
        exponents = to_middle(G, CENTRED_LEVEL, C, BD)
        if tl.max(tl.abs(exponents)) <= CENTRED_RANGE / LOG2_E:
            dQ, dK, terms, products = _add_centred(
                dQ, dK, terms, products, queries, keys, strength, dP, F, exponents, C, dtype
            )
        else:
            dQ, dK, terms, products = _add_levels(
                dQ, dK, terms, products, queries, keys, strength, dP, F, G, CENTRED_LEVEL,
                LEVELS, C, BD, dtype,
            )  # fmt: skip
    return dQ, dK, terms, tl.sum(products, axis=1)
