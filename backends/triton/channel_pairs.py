"""Forward's products of pairs of tokens with a decay per channel, in float16 and float32 calls.

    P_ij = sum_c q_ic k_jc D_ijc,   M_ij = sum_c k_ic k_jc D_ijc        for i > j

by the levels of `channel_decay.py`, or the coarse ones and one product for all pairs of neighbours.
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
    level_pairs,
    round_decayed,
)


@triton.jit
def _multiply_levels(P, M, queries, keys, high, low, end, C: tl.constexpr, dtype: tl.constexpr):
    """P and M with the pairs of the levels before end."""
    for level in range(end):
        f = level_factors(high, low, level, C, dtype)
        decayed_q = round_decayed(queries.to(tl.float32) * f, dtype)
        decayed_k = round_decayed(keys.to(tl.float32) * f, dtype)
        decayed_k_T, pairs = tl.trans(decayed_k), level_pairs(level, C)
        P = tl.where(pairs, dot_decayed(decayed_q, decayed_k_T, dtype), P)
        M = tl.where(pairs, dot_decayed(decayed_k, decayed_k_T, dtype), M)
    return P, M


@triton.jit
def _multiply_centred(P, M, queries, keys, exponents, C: tl.constexpr, dtype: tl.constexpr):
    """P and M with the pairs of blocks of CENTRED tokens."""
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
        P, M = _multiply_levels(P, M, queries, keys, high, low, LEVELS, C, dtype)
    elif WEAK:
        P, M = _multiply_levels(P, M, queries, keys, high, low, CENTRED_LEVEL, C, dtype)
        exponents = centred_sums(high, low, C, dtype)
        P, M = _multiply_centred(P, M, queries, keys, exponents, C, dtype)
    else:  # one loop over levels, since the time grows with the code; in this order it spills less
        exponents = centred_sums(high, low, C, dtype)
        levels = LEVELS.value
        if tl.max(tl.abs(exponents)) <= CENTRED_RANGE:
            P, M = _multiply_centred(P, M, queries, keys, exponents, C, dtype)
            levels = CENTRED_LEVEL.value
        P, M = _multiply_levels(P, M, queries, keys, high, low, levels, C, dtype)
    return P, M
