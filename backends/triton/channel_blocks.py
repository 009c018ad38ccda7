"""Products of pairs of tokens with a decay per channel, in bfloat16 calls.

    P_ij = sum_c q_ic k_jc D_ijc,   M_ij = sum_c k_ic k_jc D_ijc        for i > j

D_ij = 2^{G_i - G_j} with G the sums of g over a chunk. A chunk has three blocks of pairs, of 32
rows i and 32 columns j: its second half by its first half, and each half by itself. A block is one
product,

    D_ij = 2^{G_i - G_m} 2^{G_m - G_j}

with rows of q above rows of k on its left side. In the first block m is the last token of the
first half, so that both factors are at most 1. In the others it is the middle of the half, and a
factor may exceed 1: with a bound of -5 it is 2^115 at most. Products take rows as they are given,
before the L2 norm, so `fit_normalised` looks at sums and rows together. Without that norm rows may
have any elements, so sums are at most RAW_RANGE. In chunks that do not fit, the pairs of both
halves are sorted by the levels of `channel_decay.py`, one product for each.

In memory G starts again at each half (`channel_sums.py`), which is what the factors need.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import exp2_flushed
from .channel_sums import sum_entries
from .chunk_buffers import BETA, INVERSE, NUM_FACTORS, NUM_MATRICES, RK, RQ, SCORES
from .tiles import dot, round_pairs, round_to

RAW_RANGE = tl.constexpr(64.0)
"""The largest |G_i - G_m| of one product without the L2 norm. Rows may then have elements from
2^-62 to 2^62."""
NORMALISED_RANGE = tl.constexpr(122.0)
"""With the L2 norm: log2 of how far sums and norms of rows may reach together. Elements of a row of
128 channels are about 2^-4 of its norm, and bfloat16 has all its digits down to 2^-126."""
ROOM = tl.constexpr(5.0)
"""log2 of how much farther they may reach upwards: float32 ends at 2^128."""


@triton.jit
def _reach(squared_norms):
    """How far log2 of a norm lies below 0 or above ROOM, [C]; negative in between. Rows of zeros
    count as 0, and so do rows whose squares are 0 in float32."""
    log2_norm = 0.5 * tl.log2(squared_norms)
    return tl.where(squared_norms > 0, tl.maximum(log2_norm - ROOM, -log2_norm), 0.0)


@triton.jit
def fit_normalised(farthest, QQ, KK):
    """Whether both halves of a chunk may be one product each: factors times rows of q and k, whose
    squared norms are QQ and KK [C], stay in the range of bfloat16. farthest: the largest
    |G_i - G_m|."""
    return farthest + tl.max(tl.maximum(_reach(QQ), _reach(KK)), axis=0) <= NORMALISED_RANGE


@triton.jit
def _multiply(rows, f):
    """rows * f in bfloat16, in the layout of the rows. Triton would pass float32 exponents through
    shared memory to another one first."""
    return round_pairs(rows.to(tl.float32) * f, False)


@triton.jit
def _load_half(
    q, k, decayed_rows, chunk_head, tokens, first_row, first_channel, K: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, Q_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr,
):  # fmt: skip
    """BD channels of half of a chunk: rows of q and of k [HALF, 2, BD], rows of k alone and sums
    [HALF, BD]."""
    HALF: tl.constexpr = C // 2
    row, c = first_row + tl.arange(0, HALF)[:, None], first_channel + tl.arange(0, BD)[None, :]
    mask = (row < tokens) & (c < K)
    keys = k + (row * K_STRIDES[1] + c)
    queries = q + (row * Q_STRIDES[1] + c)
    is_query = tl.arange(0, 2)[None, :, None] == 0
    both = tl.load(
        tl.where(is_query, queries[:, None, :], keys[:, None, :]), mask=mask[:, None, :], other=0.0
    )
    G = tl.load(sum_entries(decayed_rows, chunk_head, row, c, BK, C))
    return both, tl.load(keys, mask=mask, other=0.0), G


@triton.jit
def _multiply_rows(both, f_row, keys, f_column, C: tl.constexpr, BD: tl.constexpr):
    """The product [C, C // 2] of rows of q and k times f_row, and keys times f_column."""
    left = _multiply(both, f_row[:, None, :])
    left = tl.reshape(tl.permute(left, [1, 0, 2]), [C, BD])
    return dot(left, tl.trans(_multiply(keys, f_column)))


@triton.jit
def _multiply_level(
    q, k, decayed_rows, chunk_head, tokens, first_row, shift, K: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, C: tl.constexpr, Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr,
):  # fmt: skip
    """The product [C, C // 2] of half of a chunk, of pairs of a level with blocks of 2 << shift
    tokens."""
    row = first_row + tl.arange(0, C // 2)[:, None]
    middle = ((row >> shift | 1) << shift) - 1
    product = tl.zeros([C, C // 2], tl.float32)
    for first_channel in range(0, K, BD):
        both, keys, G = _load_half(
            q, k, decayed_rows, chunk_head, tokens, first_row, first_channel, K, BK, BD, C,
            Q_STRIDES, K_STRIDES,
        )  # fmt: skip
        c = first_channel + tl.arange(0, BD)[None, :]
        G -= tl.load(sum_entries(decayed_rows, chunk_head, middle, c, BK, C))
        f = exp2_flushed(-tl.abs(G))
        product += _multiply_rows(both, f, keys, f, C, BD)
    return product


@triton.jit
def product_entries(matrices, chunk_head, i, j, C: tl.constexpr):
    """Pointers to M_ij in float32. Its halves lie in the memory of A_BETA and INVERSE."""
    HALF: tl.constexpr = C // 2
    start = matrices.to(tl.pointer_type(tl.float32)) + chunk_head * (NUM_MATRICES * C * HALF)
    return start + (i // HALF * (INVERSE * C * HALF) + i % HALF * C + j)


@triton.jit
def _store_block(
    product, matrices, factors, chunk_head, first_row, first_column, scale, C: tl.constexpr
):
    """Store P and M of a block, with their factors of rows and columns, below the diagonal."""
    HALF: tl.constexpr = C // 2
    r, j = tl.arange(0, C), first_column + tl.arange(0, HALF)
    i, is_query = first_row + r % HALF, r < HALF
    factors += chunk_head * (NUM_FACTORS * C)
    rk = tl.load(factors + RK * C + j)[None, :]
    of_row = tl.load(factors + tl.where(is_query, RQ, RK) * C + i)
    of_row *= tl.where(is_query, scale, tl.load(factors + BETA * C + i))
    value = of_row[:, None] * product * rk
    i, j, is_query = i[:, None], j[None, :], is_query[:, None]
    P = matrices + (chunk_head * NUM_MATRICES + SCORES) * (C * C) + (i * C + j)
    value = tl.where(i > j, value, 0.0)
    tl.store(P, round_to(value, tl.bfloat16), mask=is_query & (i != j))
    tl.store(product_entries(matrices, chunk_head, i, j, C), value, mask=is_query == 0)


@triton.jit
def multiply_blocks(
    q, k, decayed_rows, matrices, factors, chunk_head, tokens, scale, K: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, Q_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr,
):  # fmt: skip
    """Write P below its diagonal, and the lower triangle of M by `product_entries`. q and k are
    the first rows of the chunk and head; `factors` has RQ, RK and BETA."""
    HALF: tl.constexpr = C // 2
    below, first = tl.zeros([C, HALF], tl.float32), tl.zeros([C, HALF], tl.float32)
    second = tl.zeros([C, HALF], tl.float32)
    last = tl.full([1, 1], HALF - 1, tl.int32)  # of the first half
    for first_channel in range(0, K, BD):
        above, above_keys, above_G = _load_half(
            q, k, decayed_rows, chunk_head, tokens, 0, first_channel, K, BK, BD, C, Q_STRIDES,
            K_STRIDES,
        )  # fmt: skip
        under, under_keys, under_G = _load_half(
            q, k, decayed_rows, chunk_head, tokens, HALF, first_channel, K, BK, BD, C, Q_STRIDES,
            K_STRIDES,
        )  # fmt: skip
        c = first_channel + tl.arange(0, BD)[None, :]
        G = tl.load(sum_entries(decayed_rows, chunk_head, last, c, BK, C))
        f_row, f_column = exp2_flushed(under_G), exp2_flushed(G - above_G)
        above_G -= tl.load(sum_entries(decayed_rows, chunk_head, last - HALF // 2, c, BK, C))
        under_G -= tl.load(sum_entries(decayed_rows, chunk_head, last + HALF // 2, c, BK, C))
        first += _multiply_rows(
            above, exp2_flushed(above_G), above_keys, exp2_flushed(-above_G), C, BD
        )
        second += _multiply_rows(
            under, exp2_flushed(under_G), under_keys, exp2_flushed(-under_G), C, BD
        )
        below += _multiply_rows(under, f_row, above_keys, f_column, C, BD)
    _store_block(below, matrices, factors, chunk_head, HALF, 0, scale, C)
    _store_block(first, matrices, factors, chunk_head, 0, 0, scale, C)
    _store_block(second, matrices, factors, chunk_head, HALF, HALF, scale, C)


@triton.jit(noinline=True)  # seldom called: what it needs stays out of registers until then
def multiply_levels(
    q, k, decayed_rows, matrices, factors, chunk_head, tokens, scale, K: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, Q_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr,
):  # fmt: skip
    """Write the blocks of each half by itself once more, by levels, which is right for any sums."""
    HALF: tl.constexpr = C // 2
    for half in range(2):
        i, j = tl.arange(0, C)[:, None] % HALF, tl.arange(0, HALF)[None, :]
        product = tl.zeros([C, HALF], tl.float32)
        for shift in range(5):
            of_level = _multiply_level(
                q, k, decayed_rows, chunk_head, tokens, HALF * half, shift, K, BK, BD, C,
                Q_STRIDES, K_STRIDES,
            )  # fmt: skip
            product = tl.where((i ^ j) >> shift == 1, of_level, product)
        _store_block(product, matrices, factors, chunk_head, HALF * half, HALF * half, scale, C)
