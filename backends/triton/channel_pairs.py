"""Forward's products of pairs of tokens with a decay per channel.

    P_ij = sum_c q_ic k_jc D_ijc,   M_ij = sum_c k_ic k_jc D_ijc        for i > j

by the levels of `channel_decay.py`, coarse ones first. The product of a level also has entries of
pairs that lie in smaller blocks. Finer levels replace them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import exp2_flushed
from .channel_decay import (
    CENTRED_LEVEL,
    CENTRED_RANGE,
    LEVELS,
    block_pairs,
    centred_sums,
    dot_decayed,
    level_factors,
    round_decayed,
)


@triton.jit
def _multiply_levels(
    P, M, queries, keys, high, low, begin, end, C: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """P and M after the levels from begin to end, from those before."""
    for level in range(begin, end):
        f = level_factors(high, low, level, C, dtype)
        decayed_q = round_decayed(queries.to(tl.float32) * f, dtype)
        decayed_k = round_decayed(keys.to(tl.float32) * f, dtype)
        decayed_k_T, pairs = tl.trans(decayed_k), block_pairs(level, C)
        P = tl.where(pairs, dot_decayed(decayed_q, decayed_k_T, dtype), P)
        M = tl.where(pairs, dot_decayed(decayed_k, decayed_k_T, dtype), M)
    return P, M


@triton.jit
def _multiply_centred(P, M, queries, keys, exponents, C: tl.constexpr, dtype: tl.constexpr):
    """P and M with the pairs of blocks of CENTRED tokens, from those of the levels before."""
    of_row, of_column = exp2_flushed(exponents), exp2_flushed(-exponents)
    decayed_q = round_decayed(queries.to(tl.float32) * of_row, dtype)
    decayed_k = round_decayed(keys.to(tl.float32) * of_row, dtype)
    decayed_k_T = tl.trans(round_decayed(keys.to(tl.float32) * of_column, dtype))
    pairs = block_pairs(CENTRED_LEVEL, C)
    P = tl.where(pairs, dot_decayed(decayed_q, decayed_k_T, dtype), P)
    M = tl.where(pairs, dot_decayed(decayed_k, decayed_k_T, dtype), M)
    return P, M


@triton.jit
def multiply_pairs(
    queries, keys, high, low, C: tl.constexpr, dtype: tl.constexpr, WEAK: tl.constexpr
):
    """P and M [C, C] of some channels; what they hold for i <= j has no meaning. WEAK: `is_weak`
    holds for the call."""
    P, M = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    if dtype == tl.float32:  # factors of e^40 and e^-40 would cost it digits
        P, M = _multiply_levels(P, M, queries, keys, high, low, 0, LEVELS, C, dtype)
    else:
        P, M = _multiply_levels(P, M, queries, keys, high, low, 0, CENTRED_LEVEL, C, dtype)
        exponents = centred_sums(high, low, C, dtype)
        if WEAK:  # noqa: SIM114, Triton compiles one branch of a constant
            P, M = _multiply_centred(P, M, queries, keys, exponents, C, dtype)
        elif tl.max(tl.abs(exponents)) <= CENTRED_RANGE:
            P, M = _multiply_centred(P, M, queries, keys, exponents, C, dtype)
        else:
            P, M = _multiply_levels(P, M, queries, keys, high, low, CENTRED_LEVEL, LEVELS, C, dtype)
    return P, M
