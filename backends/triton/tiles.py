"""What the kernels share: where a chunk's tokens lie, tiles of [tokens, head dim], products, decay,
and the inverse of a unit lower triangular [64, 64]."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
L2_EPS = tl.constexpr(1e-6)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in a half-precision (or any) dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off instead
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b):
    """a @ b in float32; float32 operands go through the tensor cores as three TF32 products."""
    if INTERPRETED:  # its product of bfloat16 reads the bits as integers; the rounding is done
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def locate(
    slot, cu_seqlens, slot_sequence, slot_chunk, T, NT, VARLEN: tl.constexpr, C: tl.constexpr
):
    """First token of a slot's chunk, and how many it has (0 or less: the slot is not in use)."""
    if VARLEN:
        n = tl.load(slot_sequence + slot).to(tl.int64)
        start = tl.load(cu_seqlens + n).to(tl.int64) + tl.load(slot_chunk + slot).to(tl.int64) * C
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
    else:
        start = (slot // NT) * T + (slot % NT) * C
        end = (slot // NT + 1) * T
    return start, end - start


@triton.jit
def span(n, cu_seqlens, first_slot, T, NT, VARLEN: tl.constexpr):
    """First token, tokens and first slot of sequence n."""
    if VARLEN:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        return start, tl.load(cu_seqlens + n + 1).to(tl.int64) - start, tl.load(first_slot + n)
    return n * T, (n * 0 + T), n * NT


@triton.jit
def load_rows(
    x, start, count, head, HEADS: tl.constexpr, D: tl.constexpr,
    first, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x[start:start + C, head, first:first + BD] of [tokens, HEADS, D], zero past count and D."""
    r, d = tl.arange(0, C), first + tl.arange(0, BD)
    at = x + (start * HEADS + head) * D + r[:, None] * (HEADS * D) + d[None, :]
    return tl.load(at, mask=(r[:, None] < count) & (d[None, :] < D), other=0.0)


@triton.jit
def load_columns(
    x, start, count, head, HEADS: tl.constexpr, D: tl.constexpr,
    first, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The transpose of `load_rows`: [BD, C]. A second load costs less than turning registers."""
    r, d = tl.arange(0, C), first + tl.arange(0, BD)
    at = x + (start * HEADS + head) * D + r[None, :] * (HEADS * D) + d[:, None]
    return tl.load(at, mask=(r[None, :] < count) & (d[:, None] < D), other=0.0)


@triton.jit
def store_rows(
    x, value, start, count, head, HEADS: tl.constexpr, D: tl.constexpr,
    first, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_rows`, rounding to x's dtype."""
    r, d = tl.arange(0, C), first + tl.arange(0, BD)
    at = x + (start * HEADS + head) * D + r[:, None] * (HEADS * D) + d[None, :]
    mask = (r[:, None] < count) & (d[None, :] < D)
    tl.store(at, narrow(value, x.dtype.element_ty), mask=mask)


@triton.jit
def load_scalars(x, start, count, head, HEADS: tl.constexpr, C: tl.constexpr):
    """x[start:start + C, head] of [tokens, HEADS] in float32, zero past count."""
    r = tl.arange(0, C)
    return tl.load(x + start * HEADS + head + r * HEADS, mask=r < count, other=0.0).to(tl.float32)


@triton.jit
def load_decay(G, start, count, head, HEADS: tl.constexpr, C: tl.constexpr):
    """G of a chunk, and its last value; rows past the end repeat that, so that no exponent that is
    made of their differences is positive."""
    last = tl.minimum(count, C) - 1
    rows = tl.minimum(tl.arange(0, C), last)
    first = G + start * HEADS + head
    return tl.load(first + rows * HEADS), tl.load(first + last * HEADS)


@triton.jit
def store_scalars(x, value, start, count, head, HEADS: tl.constexpr, C: tl.constexpr):
    """The inverse of `load_scalars`."""
    r = tl.arange(0, C)
    at = x + start * HEADS + head + r * HEADS
    tl.store(at, narrow(value, x.dtype.element_ty), mask=r < count)


@triton.jit
def reciprocal_norm(x, L2: tl.constexpr):
    """1 / sqrt(sum x^2 + 1e-6) of each row of x, or ones."""
    wide = x.to(tl.float32)
    squares = tl.sum(wide * wide, axis=1)
    if L2:
        return 1 / tl.sqrt(squares + L2_EPS)
    return squares * 0 + 1


@triton.jit
def tile_offsets(
    block, first, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    V_FIRST: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of the [BK, BV] tile from column `first` in a state [.., K, V] (or V, K)."""
    i, j = tl.arange(0, BK)[:, None], first + tl.arange(0, BV)[None, :]
    inner = (j * K + i) if V_FIRST else (i * V + j)
    return block * (K * V) + inner, (i < K) & (j < V)


@triton.jit
def decay_matrix(G, C: tl.constexpr):
    """L_ij = exp(G_i - G_j) for i >= j, zero above; masked before the exponential."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.where(i >= j, tl.exp(tl.where(i >= j, G[:, None] - G[None, :], 0.0)), 0.0)


@triton.jit
def strictly_lower(x, C: tl.constexpr):
    """x with its diagonal and all above set to zero."""
    return tl.where(tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :], x, 0.0)


@triton.jit
def invert(M, C: tl.constexpr):
    """(I + M)^-1 for strictly lower M [C, C], in float32.

    Forward substitution on the diagonal blocks of 16, all at once; then neighbours are merged,
    twice: with X the inverse of the block diagonal and F what M holds between two neighbours,
    X - X F X is the inverse at twice the block size.
    """
    N: tl.constexpr = C // 16
    block, other = tl.arange(0, N)[:, None, None, None], tl.arange(0, N)[None, None, :, None]
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    diagonal = tl.sum(tl.where(block == other, tl.reshape(M, [N, 16, N, 16]), 0.0), axis=2)
    X = tl.where(row == column, 1.0, 0.0) + diagonal * 0
    for i in range(1, 16):
        factors = tl.sum(tl.where(row == i, diagonal, 0.0), axis=1)  # [N, 16]
        known = tl.sum(factors[:, :, None] * X, axis=1)  # [N, 16]
        X = tl.where(row == i, X - known[:, None, :], X)
    X = tl.reshape(tl.where(block == other, X[:, :, None, :], 0.0), [C, C])
    r, c = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for step in tl.static_range(2):
        size = 16 << step
        between = (r // size != c // size) & (r // (2 * size) == c // (2 * size))
        X -= dot(dot(X, tl.where(between, M, 0.0)), X)
    return X
