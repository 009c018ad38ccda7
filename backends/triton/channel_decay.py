"""A decay per channel: its gates, and the decays between tokens of a chunk.

    D_ij = exp(G_i - G_j) for i > j, [K] for each pair of tokens, with G the sum of g in the chunk

A matrix product cannot apply D_ij whole, and e^{G_i} e^{-G_j} overflows. So pairs are sorted by
levels. A level divides the chunk into blocks of 2 h tokens, h = 32, 16, 8, 4, 2, 1. Every pair
i > j has one level at which i lies in the right half of a block and j in its left half. There

    D_ij = f_i f_j,    f_i = exp(-|G_i - G_m|),    m the last token of the left half

and both factors are at most 1. A factor underflows only where D_ij is smaller still.

    sum_c x_ic k_jc D_ijc = (f * x)_i . (f * k)_j      a matrix product; others' entries are masked
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import FLOOR, compute_log_decay, load_A_log
from .launch import ANY_ALIGNMENT
from .tiles import dot, dot_split, load_input_rows, round_to

LEVELS = tl.constexpr(6)
"""log2 of the tokens of a chunk."""
NUMBERS = tuple(name for name in ANY_ALIGNMENT if name not in ("g", "dt_bias"))
"""Pointers that kernels with a decay per channel read one number at a time."""


@triton.jit
def load_channel_gates(
    g, A_log, dt_bias, first_token, tokens, head, first_channel,
    G_STRIDES: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr,
):  # fmt: skip
    """Raw gates with dt_bias, and log decays clamped to FLOOR and zero past the end, [C, BD]
    each."""
    raw = load_input_rows(g, first_token, tokens, head, G_STRIDES, K, first_channel, C, BD)
    raw = raw.to(tl.float32)
    log_decay = raw
    if FUSED_GATE:
        if dt_bias is not None:
            c = first_channel + tl.arange(0, BD)
            raw += tl.load(dt_bias + head * K + c, mask=c < K, other=0.0).to(tl.float32)[None, :]
        log_decay = compute_log_decay(raw, load_A_log(A_log, head), LOWER_BOUND)
    log_decay = tl.where(log_decay < FLOOR, FLOOR, log_decay)  # tl.maximum would drop NaN
    return raw, tl.where(tl.arange(0, C)[:, None] < tokens, log_decay, 0.0)


@triton.jit
def sum_gates(log_decay, dtype: tl.constexpr):
    """G of log_decay [C, BD], precise enough for differences: in float64 for float32 calls."""
    return tl.cumsum(log_decay.to(tl.float64 if dtype == tl.float32 else tl.float32), axis=0)


@triton.jit
def level_factors(G, level, C: tl.constexpr, BD: tl.constexpr):
    """f of all tokens at a level, [C, BD]."""
    shift = LEVELS - 1 - level  # h = 1 << shift
    middle = ((tl.arange(0, C) >> (shift + 1)) << (shift + 1)) + (1 << shift) - 1
    G_middle = tl.gather(G, tl.broadcast_to(middle[:, None], C, BD), axis=0)
    return tl.exp(-tl.abs(G - G_middle).to(tl.float32))


@triton.jit
def level_pairs(level, C: tl.constexpr):
    """Whether i and j lie in different halves of one block of a level, [C, C], for i > j and for
    i < j."""
    return (tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]) >> (LEVELS - 1 - level) == 1


@triton.jit
def round_decayed(x, dtype: tl.constexpr):
    """f * x in float32 as an operand of `dot_decayed`. It stays float32 in float16 calls, since
    small factors leave the range of float16."""
    return round_to(x, tl.bfloat16) if dtype == tl.bfloat16 else x


@triton.jit
def dot_decayed(a, b, dtype: tl.constexpr):
    """a @ b in float32 of operands by `round_decayed`."""
    return dot_split(a, b) if dtype == tl.float16 else dot(a, b)
