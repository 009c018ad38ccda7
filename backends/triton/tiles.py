"""Building blocks of the kernels: rounding, products, and loads and stores of tiles.

float16 ends at 65504 and has fewer digits below 6e-5. So rows of operands that are rounded to
float16 are divided by powers of two, their scales, and products are multiplied by them.

Tensors of tokens are [tokens, heads, D], contiguous. A tile has the C tokens of a chunk, of which
the last chunk of a sequence may have fewer. Loads give zero past the end, and stores skip it.
States are held transposed, in tiles [BV, BK] of a block of BV columns of V.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
PRECISION = tl.constexpr("ieee" if INTERPRETED.value else "bf16x6")


# === arithmetic ===


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter truncates instead
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def round_pairs(x, MOVABLE: tl.constexpr = True):
    """x in float32 rounded to bfloat16, two numbers at once: one fast instruction also where the
    results are numbers again. Not MOVABLE: in the layout that x has, as code that is not pure."""
    if INTERPRETED:
        return round_to(x, tl.bfloat16)
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=MOVABLE, pack=2
    )


@triton.jit
def place_like(x, product):
    """x in the layout of a product of the same shape. Triton would compute with x in the layout in
    which it is loaded, and exchange the results between threads."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r", [x, product], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def row_entries(rows, index, first_channel, C: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """Pointers to BD channels of tile number `index` of rows [.., C, BK]."""
    r, c = tl.arange(0, C)[:, None], first_channel + tl.arange(0, BD)[None, :]
    return rows + index * (C * BK) + (r * BK + c)


@triton.jit
def dot(a, b):
    """a @ b in float32.

    The tensor cores compute a product of float32 operands as six products of bfloat16 parts. These
    keep all 24 bits of the mantissa, where three TF32 products keep 21.
    """
    if INTERPRETED:  # Triton's interpreter reads the bits of bfloat16 operands as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def row_exponents(x):
    """Exponents of the largest elements of the rows of x in float32, [rows, 1], as float32 stores
    them: between 0 and 255, and 127 for 1."""
    return tl.max(tl.abs(x), axis=1, keep_dims=True).to(tl.int32, bitcast=True) >> 23


@triton.jit
def powers_of_two(exponents):
    """The float32 numbers with these exponents, and their reciprocals. Exponents are clamped so
    that both are normal numbers."""
    exponents = tl.minimum(tl.maximum(exponents, 1), 253)
    powers = (exponents << 23).to(tl.float32, bitcast=True)
    return powers, ((254 - exponents) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_rows(x, dtype: tl.constexpr):
    """x over its scales, rounded to `dtype`, and the scales: [rows, 1], or 1 unless dtype is
    float16. Each row's largest element is then between 1 and 2."""
    if dtype == tl.float16:
        scales, reciprocals = powers_of_two(row_exponents(x))
        rounded = (x * reciprocals).to(dtype)
    else:
        scales, rounded = 1.0, round_to(x, dtype)
    return rounded, scales


@triton.jit
def dot_rounded(a, b, dtype: tl.constexpr):
    """a @ b in float32, with the rows of a rounded by `round_rows`."""
    rounded, scales = round_rows(a, dtype)
    return scales * dot(rounded, b)


@triton.jit
def dot_split(a, b):
    """a @ b of float32 operands, each the sum of two bfloat16 parts that keep 16 bits of the
    mantissa: three products, without that of the two smaller parts."""
    if INTERPRETED:  # it would ignore input_precision
        a_high, b_high = round_to(a, tl.bfloat16), round_to(b, tl.bfloat16)
        a_low = round_to(a - a_high.to(tl.float32), tl.bfloat16)
        b_low = round_to(b - b_high.to(tl.float32), tl.bfloat16)
        return dot(a_high, b_high) + (dot(a_high, b_low) + dot(a_low, b_high))
    return tl.dot(a, b, input_precision="bf16x3")


@triton.jit
def mask_strictly_lower(x, C: tl.constexpr):
    """x [C, C] with zeros on and above the diagonal."""
    return tl.where(tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :], x, 0.0)


@triton.jit
def compute_decay_matrix(G, C: tl.constexpr):
    """L_ij = exp(G_i - G_j) for i >= j, else 0. The mask precedes the exponential, which may
    overflow above the diagonal."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    exponents = (G[:, None] - G[None, :]).to(tl.float32)
    return tl.exp(tl.where(i >= j, exponents, -float("inf")))


@triton.jit
def select_last(x, C: tl.constexpr):
    """The last element of x [C], without rounding."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), axis=0)


# === tokens ===


@triton.jit
def load_rows(
    x, first_token, tokens, head, HEADS: tl.constexpr, D: tl.constexpr,
    first_column, C: tl.constexpr, BD: tl.constexpr, FULL: tl.constexpr = False,
):  # fmt: skip
    """The tile [C, BD] of x [.., HEADS, D] from a token and a column; zero past `tokens` and D.

    FULL: the tile has all C tokens, so that the load needs no mask for them.
    """
    r, d = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    pointers = x + ((first_token * HEADS + head) * D + first_column) + (r * (HEADS * D) + d)
    return _load_tile(pointers, r, first_column + d, tokens, D, BD, FULL)


@triton.jit
def _load_tile(
    pointers, r, column, tokens, D: tl.constexpr, BD: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    if FULL and D % BD == 0:
        return tl.load(pointers)
    if FULL:
        return tl.load(pointers, mask=(column < D) & (r >= 0), other=0.0)
    return tl.load(pointers, mask=(r < tokens) & (column < D), other=0.0)


@triton.jit
def load_input_rows(
    x, first_token, tokens, head, STRIDES: tl.constexpr, D: tl.constexpr,
    first_column, C: tl.constexpr, BD: tl.constexpr, FULL: tl.constexpr = False,
):  # fmt: skip
    """`load_rows` of a tensor whose tokens and heads have any STRIDES, of `token_strides`."""
    r, d = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    start = first_token * STRIDES[1] + head * STRIDES[2] + first_column
    return _load_tile(x + start + (r * STRIDES[1] + d), r, first_column + d, tokens, D, BD, FULL)


@triton.jit
def load_input_scalars(
    x, first_token, tokens, head, STRIDES: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """`load_scalars` of a tensor whose tokens and heads have any STRIDES."""
    r = tl.arange(0, C)
    pointers = x + first_token * STRIDES[1] + head * STRIDES[2] + r * STRIDES[1]
    return tl.load(pointers, mask=r < tokens, other=0.0).to(tl.float32)


@triton.jit
def find_batch_row(x, first_token, T, STRIDES: tl.constexpr):
    """x, moved so that rows of the batch may also have any stride. Later offsets count tokens over
    the whole batch, as if rows followed each other."""
    if STRIDES[0] != 0:
        x += (first_token // T) * STRIDES[0]
    return x


@triton.jit
def store_rows(
    x, value, first_token, tokens, head, HEADS: tl.constexpr, D: tl.constexpr,
    first_column, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store value [C, BD] where `load_rows` reads, rounded to x's dtype."""
    r, d = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    pointers = x + ((first_token * HEADS + head) * D + first_column) + (r * (HEADS * D) + d)
    mask = (r < tokens) & (first_column + d < D)
    tl.store(pointers, round_to(value, x.dtype.element_ty), mask=mask)


@triton.jit
def store_rows_transposed(
    x, value, first_token, tokens, head, HEADS: tl.constexpr, D: tl.constexpr,
    first_column, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store value [BD, C] where `load_rows` reads its transpose, rounded to x's dtype."""
    r, d = tl.arange(0, C)[None, :], tl.arange(0, BD)[:, None]
    pointers = x + ((first_token * HEADS + head) * D + first_column) + (r * (HEADS * D) + d)
    mask = (r < tokens) & (first_column + d < D)
    tl.store(pointers, round_to(value, x.dtype.element_ty), mask=mask)


@triton.jit
def clear_rows(
    x, first_token, end, T, head, HEADS: tl.constexpr, D: tl.constexpr,
    first_column, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Zero the tokens from `end` to T where `load_rows` reads."""
    token, d = first_token + tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    pointers = x + (head * D + first_column) + (token * (HEADS * D) + d)
    mask = (token >= end) & (token < T) & (first_column + d < D)
    tl.store(pointers, tl.zeros([C, BD], x.dtype.element_ty), mask=mask)


@triton.jit
def clear_scalars(x, first_token, end, T, head, HEADS: tl.constexpr, C: tl.constexpr):
    """Zero the tokens from `end` to T where `load_scalars` reads."""
    token = first_token + tl.arange(0, C)
    mask = (token >= end) & (token < T)
    tl.store(x + token * HEADS + head, tl.zeros([C], x.dtype.element_ty), mask=mask)


@triton.jit
def load_scalars(x, first_token, tokens, head, HEADS: tl.constexpr, C: tl.constexpr):
    """C tokens of x [.., HEADS] in float32; zero past `tokens`."""
    r = tl.arange(0, C)
    pointers = x + first_token * HEADS + head + r * HEADS
    return tl.load(pointers, mask=r < tokens, other=0.0).to(tl.float32)


@triton.jit
def store_scalars(x, value, first_token, tokens, head, HEADS: tl.constexpr, C: tl.constexpr):
    """Store value [C] where `load_scalars` reads, rounded to x's dtype."""
    r = tl.arange(0, C)
    pointers = x + first_token * HEADS + head + r * HEADS
    tl.store(pointers, round_to(value, x.dtype.element_ty), mask=r < tokens)


# === states ===


@triton.jit
def compute_state_offsets(
    index, first_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    V_FIRST: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a tile [BV, BK] from first_v of V, in state number `index`.

    States are [V, K] in memory if V_FIRST, else [K, V].
    """
    i, j = tl.arange(0, BK)[None, :], first_v + tl.arange(0, BV)[:, None]
    within = (j * K + i) if V_FIRST else (i * V + j)
    return index * (K * V) + within, (i < K) & (j < V)


@triton.jit
def load_state(
    states, index, first_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """The tile [BV, BK] from first_v of V, of state number `index` in states [.., V, K]."""
    offsets, mask = compute_state_offsets(index, first_v, K, V, BK, BV, True)
    if K == BK and V % BV == 0:
        return tl.load(states + offsets)
    return tl.load(states + offsets, mask=mask, other=0.0)


@triton.jit
def load_state_columns(
    states, index, first_v, first_k, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """The tile [BV, BD] from first_v of V and first_k of K, as `load_state`."""
    i, j = first_k + tl.arange(0, BD)[None, :], first_v + tl.arange(0, BV)[:, None]
    pointers = states + (index * (K * V) + j * K + i)
    if K % BD == 0 and V % BV == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(i < K) & (j < V), other=0.0)
