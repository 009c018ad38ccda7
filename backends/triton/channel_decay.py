"""A decay per channel: its gates, and the decays between tokens of a chunk.

    D_ij = exp(G_i - G_j) for i > j, [K] for each pair of tokens, with G the sum of g in the chunk

A matrix product cannot apply D_ij whole, and e^{G_i} e^{-G_j} overflows. So pairs are sorted by
levels. A level divides the chunk into blocks of 2 h tokens, h = 32, 16, 8, 4, 2, 1. Every pair
i > j has one level at which i lies in the right half of a block and j in its left half. There

    D_ij = f_i f_j,    f_i = exp(-|G_i - G_m|),    m the last token of the left half

and both factors are at most 1. A factor underflows only where D_ij is smaller still.

    sum_c x_ic k_jc D_ijc = (f * x)_i . (f * k)_j      a product; others' entries are masked

Where |G_i - G_m| is small in blocks of 16 tokens, one product takes the place of the last four
levels: there D_ij = exp(G_i - G_m) exp(G_m - G_j), with a factor for i, and one for j that may
exceed 1.

Sums are products of a selector, a matrix of -1, 0 and 1, with the g of a chunk, so that none is the
difference of others. They are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.problem import Call

from .activation import FLOOR, LOG2_E, compute_log_decay, exp2_flushed, load_A_log
from .launch import ANY_ALIGNMENT
from .tiles import dot, dot_split, load_input_rows, place_like, round_pairs, round_to

LEVELS = tl.constexpr(6)
"""log2 of the tokens of a chunk."""
CENTRED, CENTRED_LEVEL = tl.constexpr(16), tl.constexpr(2)
"""Tokens of a block whose pairs one product serves if decays are weak, and the level it replaces
with all that follow."""
CENTRED_RANGE = tl.constexpr(58.0)
"""The largest |G_i - G_m| in base 2 that is weak: e^40."""
NUMBERS = tuple(name for name in ANY_ALIGNMENT if name not in ("g", "dt_bias"))
"""Pointers that kernels with a decay per channel read one number at a time."""


def is_weak(call: Call) -> bool:
    """Whether the bound of a call's gate keeps |G_i - G_m| in CENTRED_RANGE."""
    if not call.use_gate_in_kernel or call.gate_lower_bound is None:
        return False
    return bool(-call.gate_lower_bound * LOG2_E.value * CENTRED.value / 2 <= CENTRED_RANGE.value)


@triton.jit
def load_channel_gates(
    g, A_log, dt_bias, first_token, tokens, head, first_channel,
    G_STRIDES: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, product=None,
):  # fmt: skip
    """Raw gates with dt_bias, and log decays clamped to FLOOR and zero past the end, [C, BD]
    each; in the layout of a product, if one is given."""
    raw = load_input_rows(g, first_token, tokens, head, G_STRIDES, K, first_channel, C, BD)
    raw = raw.to(tl.float32)
    if product is not None:
        raw = place_like(raw, product)
    log_decay = raw
    if FUSED_GATE:
        if dt_bias is not None:
            c = first_channel + tl.arange(0, BD)
            raw += tl.load(dt_bias + head * K + c, mask=c < K, other=0.0).to(tl.float32)[None, :]
        log_decay = compute_log_decay(raw, load_A_log(A_log, head), LOWER_BOUND)
    log_decay = tl.maximum(log_decay, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return raw, tl.where(tl.arange(0, C)[:, None] < tokens, log_decay, 0.0)


@triton.jit
def split(x, dtype: tl.constexpr, PAIRED: tl.constexpr = False):
    """x in float32 as the sum of two bfloat16 parts, right to 2^-18 of it. In float32 calls the
    first part is all of it. PAIRED: by `round_pairs`."""
    if dtype == tl.float32:
        high, low = x, x
    else:
        high = round_pairs(x) if PAIRED else round_to(x, tl.bfloat16)
        rest = x - high.to(tl.float32)
        low = round_pairs(rest) if PAIRED else round_to(rest, tl.bfloat16)
    return high, low


@triton.jit
def sum_selected(selector, high, low, dtype: tl.constexpr):
    """selector [C, C] @ g, [C, BD] in float32, from the parts of g."""
    if dtype == tl.float32:
        sums = dot(selector.to(tl.float32), high)
    else:
        sums = dot(selector.to(tl.bfloat16), high) + dot(selector.to(tl.bfloat16), low)
    return sums


@triton.jit
def select_to_middle(level, C: tl.constexpr):
    """The selector of -|G_i - G_m|, m the last token of the left half of i's block at a level, and
    whether i lies behind m, [C, 1]."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    shift = LEVELS - 1 - level  # h = 1 << shift
    middle = (((i >> shift) | 1) << shift) - 1
    first, count = tl.minimum(i, middle) + 1, tl.abs(i - middle)
    between = (t - first).to(tl.uint32) < count.to(tl.uint32)  # below `first`, it wraps around
    return tl.where(between, 1.0, 0.0), i > middle


@triton.jit
def level_factors(high, low, level, C: tl.constexpr, dtype: tl.constexpr):
    """f of all tokens at a level, [C, BD]."""
    selector, _ = select_to_middle(level, C)
    return exp2_flushed(sum_selected(selector, high, low, dtype))


@triton.jit
def centred_sums(high, low, C: tl.constexpr, dtype: tl.constexpr):
    """G_i - G_m at CENTRED_LEVEL, [C, BD]."""
    selector, behind = select_to_middle(CENTRED_LEVEL, C)
    return sum_selected(tl.where(behind, selector, -selector), high, low, dtype)


@triton.jit
def prefix_sums(high, low, C: tl.constexpr, dtype: tl.constexpr):
    """G_i, [C, BD]."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return sum_selected(tl.where(t <= i, 1.0, 0.0), high, low, dtype)


@triton.jit
def suffix_sums(high, low, C: tl.constexpr, dtype: tl.constexpr):
    """gamma - G_i, [C, BD]."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return sum_selected(tl.where(t > i, 1.0, 0.0), high, low, dtype)


@triton.jit
def level_pairs(level, C: tl.constexpr):
    """Whether i and j lie in different halves of one block of a level, [C, C], for i > j and for
    i < j."""
    return (tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]) >> (LEVELS - 1 - level) == 1


@triton.jit
def block_pairs(level, C: tl.constexpr):
    """Whether i and j lie in one block of a level, [C, C]."""
    return (tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]) >> (LEVELS - level) == 0


@triton.jit
def round_decayed(x, dtype: tl.constexpr, PAIRED: tl.constexpr = False):
    """f * x in float32 as an operand of `dot_decayed`. It stays float32 in float16 calls, since
    small factors leave the range of float16. PAIRED: by `round_pairs`."""
    if dtype != tl.bfloat16:
        rounded = x
    elif PAIRED:
        rounded = round_pairs(x)
    else:
        rounded = round_to(x, tl.bfloat16)
    return rounded


@triton.jit
def dot_decayed(a, b, dtype: tl.constexpr):
    """a @ b in float32 of operands by `round_decayed`."""
    return dot_split(a, b) if dtype == tl.float16 else dot(a, b)
