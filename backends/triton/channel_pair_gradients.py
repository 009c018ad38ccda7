"""Backward's products of pairs of tokens with a decay per channel.

With dP and F [C, C] of `matrix_gradients.py`, for i > j, by the levels of `channel_decay.py`,

    dQ_i += sum_j dP_ij D_ij * K_j             dK_j += sum_i D_ij * (dP_ij Q_i + beta_i F_ij K_i)
    dK_i += beta_i sum_j F_ij D_ij * K_j

`terms` gets, for each product of these with a row of Q or K, that of i less that of j.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import exp2_flushed
from .channel_decay import (
    CENTRED_LEVEL,
    CENTRED_RANGE,
    LEVELS,
    dot_decayed,
    round_decayed,
)
from .gate_buffers import CENTRED_SUMS, sum_by
from .grad_matrices import load_level, load_near_pairs


@triton.jit
def _add_level(
    dQ, dK, terms, products, queries, keys, strength, grad_matrices, selectors, high, low,
    chunk_head, level, FAR: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """`add_pairs` of a level. A token in the right half of its block is an i, one in the left half
    a j. The matrices are loaded behind f: before it they take registers, later they are waited
    for."""
    f = exp2_flushed(sum_by(selectors, level, high, low, C, dtype))
    dP = load_level(grad_matrices, chunk_head * 2, level, FAR, C)
    F = load_level(grad_matrices, chunk_head * 2 + 1, level, FAR, C)
    right = (tl.arange(0, C)[:, None] >> (LEVELS - 1 - level)) & 1 == 1
    is_i, is_j = tl.where(right, 1.0, 0.0), tl.where(right, 0.0, 1.0)
    strength_i = is_i * strength[:, None]
    k_f = round_decayed(keys * f, dtype, True)
    x_f = round_decayed(tl.where(right, queries * f, keys * f), dtype, True)
    from_P = dot_decayed(dP, x_f, dtype)
    dx = f * from_P
    dQ += is_i * dx
    dK += is_j * dx
    terms += (is_i - is_j) * (x_f.to(tl.float32) * from_P)
    from_F = dot_decayed(F, k_f, dtype)
    dK += (strength_i + is_j) * (f * from_F)
    product = k_f.to(tl.float32) * from_F
    terms += (strength_i - is_j) * product
    products += tl.sum(is_i * product, axis=1)
    return dQ, dK, terms, products


@triton.jit
def _add_near_levels(
    dQ, dK, terms, products, queries, keys, strength, grad_matrices, selectors, high, low,
    chunk_head, C: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """`add_pairs` of the levels from CENTRED_LEVEL on."""
    for level in range(CENTRED_LEVEL.value, LEVELS):
        dQ, dK, terms, products = _add_level(
            dQ, dK, terms, products, queries, keys, strength, grad_matrices, selectors, high, low,
            chunk_head, level, False, C, dtype,
        )  # fmt: skip
    return dQ, dK, terms, products


@triton.jit
def _add_centred(
    dQ, dK, terms, products, queries, keys, strength, grad_matrices, chunk_head, exponents,
    C: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """`add_pairs` of the blocks of CENTRED tokens. A token is an i of some pairs, a j of others."""
    P, F = chunk_head * 2, chunk_head * 2 + 1
    of_i, of_j = exp2_flushed(exponents), exp2_flushed(-exponents)
    q_i = round_decayed(queries * of_i, dtype, True)
    k_i = round_decayed(keys * of_i, dtype, True)
    k_j = round_decayed(keys * of_j, dtype, True)
    dQ_i = dot_decayed(load_near_pairs(grad_matrices, P, False, C), k_j, dtype)
    dQ += of_i * dQ_i
    terms += q_i.to(tl.float32) * dQ_i
    dK_i = dot_decayed(load_near_pairs(grad_matrices, F, False, C), k_j, dtype)
    dK += strength[:, None] * (of_i * dK_i)
    product = k_i.to(tl.float32) * dK_i
    terms += strength[:, None] * product
    products += tl.sum(product, axis=1)
    dK_j = dot_decayed(load_near_pairs(grad_matrices, P, True, C), q_i, dtype)
    dK_j += dot_decayed(load_near_pairs(grad_matrices, F, True, C), k_i, dtype)
    dK += of_j * dK_j
    terms -= k_j.to(tl.float32) * dK_j
    return dQ, dK, terms, products


@triton.jit
def add_pairs(
    dQ, dK, terms, queries, keys, strength, grad_matrices, selectors, high, low, chunk_head,
    C: tl.constexpr, WEAK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dQ, dK and terms [C, BD] with those of pairs, and rowsum(K * sum_j F_ij D_ij * K_j) [C], from
    normalised rows of q and k. WEAK: `is_weak` holds for the call. Neighbours come first: in this
    order it spills less."""
    products = tl.zeros([C], tl.float32)
    if dtype == tl.float32:  # factors of e^40 and e^-40 would cost it digits
        dQ, dK, terms, products = _add_near_levels(
            dQ, dK, terms, products, queries, keys, strength, grad_matrices, selectors, high, low,
            chunk_head, C, dtype,
        )  # fmt: skip
    else:
        exponents = sum_by(selectors, CENTRED_SUMS, high, low, C, dtype)
        # without the slow branch ptxas 12.8 (Triton 3.6) miscompiles float16: it computes addresses
        # from a register that nothing writes, for which tests/uniform_registers.py looks
        SLOW_BRANCH: tl.constexpr = not WEAK or dtype == tl.float16
        weak = tl.max(tl.abs(exponents)) <= CENTRED_RANGE if SLOW_BRANCH else True
        if weak:
            dQ, dK, terms, products = _add_centred(
                dQ, dK, terms, products, queries, keys, strength, grad_matrices, chunk_head,
                exponents, C, dtype,
            )  # fmt: skip
        else:
            dQ, dK, terms, products = _add_near_levels(
                dQ, dK, terms, products, queries, keys, strength, grad_matrices, selectors, high,
                low, chunk_head, C, dtype,
            )  # fmt: skip
    for level in tl.static_range(CENTRED_LEVEL):
        dQ, dK, terms, products = _add_level(
            dQ, dK, terms, products, queries, keys, strength, grad_matrices, selectors, high, low,
            chunk_head, level, True, C, dtype,
        )  # fmt: skip
    return dQ, dK, terms, products
