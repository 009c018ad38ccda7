"""What the kernels share: where a chunk's tokens lie, tiles of [tokens, head dim], products, decay,
and the inverse of a unit lower triangular [64, 64].

Sequences are cut into pieces of C tokens (chunks, in slots) or more. Piece i of sequence n has the
number cu_seqlens[n] // length + n + i: in packed input some numbers stay unused, and nobody needs a
table or has to read cu_seqlens back.

What a stage hands to the next is kept by slot and value head, padded to C tokens: `factors`
[slots, HV, FACTORS, C] in float32, one row each of G, beta, e^{gamma - G} rk, scale e^G rq, rq and
rk (the reciprocal norms of q and k, or ones), and what a float32 call's G loses as a float32; and
`matrices` [slots, HV, MATRICES, C, C] in the call's dtype: A_v = A diag(beta), A_k = A diag(beta
e^G rk), P and A.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from gdn.definition import GATE_FLOOR, L2_EPS

EPS = tl.constexpr(L2_EPS)
FLOOR = tl.constexpr(GATE_FLOOR)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
PRECISION = tl.constexpr("ieee" if INTERPRETED.value else "bf16x6")
FACTORS = tl.constexpr(7)
LOG_DECAY, STRENGTH, ONTO, READ, NORM_Q, NORM_K, REST = (tl.constexpr(i) for i in range(7))
MATRICES = tl.constexpr(4)
A_V, A_K, SCORES, INVERSE = (tl.constexpr(i) for i in range(4))


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
    """a @ b in float32; float32 operands go through the tensor cores as six bfloat16 products,
    which together keep their 24 bits (three TF32 products keep 21)."""
    if INTERPRETED:  # its product of bfloat16 reads the bits as integers; the rounding is done
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def sequence_of(piece, cu_seqlens, N, length):
    """The last sequence whose first piece is not past this one, and the piece's place in it."""
    low, high = piece * 0, piece * 0 + N
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle).to(tl.int64) // length + middle <= piece
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low, piece - (tl.load(cu_seqlens + low).to(tl.int64) // length + low)


@triton.jit
def locate(slot, cu_seqlens, N, T, NT, VARLEN: tl.constexpr, C: tl.constexpr):
    """First token of a slot's chunk, and how many it has (0 or less: the slot is not in use)."""
    if VARLEN:
        n, index = sequence_of(slot, cu_seqlens, N, C)
        start = tl.load(cu_seqlens + n).to(tl.int64) + index * C
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
    else:
        start, end = (slot // NT) * T + (slot % NT) * C, (slot // NT + 1) * T
    return start, end - start


@triton.jit
def span(
    piece, cu_seqlens, N, T, NT, each, LENGTH,
    VARLEN: tl.constexpr, CUT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """First token, tokens and first slot of a piece of LENGTH chunks (not CUT: of a sequence)."""
    if VARLEN:
        n, index = piece, piece * 0
        if CUT:
            n, index = sequence_of(piece, cu_seqlens, N, LENGTH * C)
        first = tl.load(cu_seqlens + n).to(tl.int64)
        start = first + index * LENGTH * C
        left = tl.load(cu_seqlens + n + 1).to(tl.int64) - start
        slot = first // C + n + index * LENGTH
    else:
        n, index = piece // each, piece % each
        start, left = n * T + index * LENGTH * C, T - index * LENGTH * C
        slot = n * NT + index * LENGTH
    if CUT:
        left = tl.minimum(left, LENGTH * C)
    return start, tl.maximum(left, 0), slot


@triton.jit
def load_rows(
    x, start, count, head, HEADS: tl.constexpr, D: tl.constexpr,
    first, C: tl.constexpr, BD: tl.constexpr, FULL: tl.constexpr = False,
):  # fmt: skip
    """x[start:start + C, head, first:first + BD] of [tokens, HEADS, D], zero past count and D.

    FULL says that all C tokens are there, which saves the tests.
    """
    r, d = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    at = x + ((start * HEADS + head) * D + first) + (r * (HEADS * D) + d)
    if FULL and D % BD == 0:
        return tl.load(at)
    if FULL:
        return tl.load(at, mask=(first + d < D) & (r >= 0), other=0.0)
    return tl.load(at, mask=(r < count) & (first + d < D), other=0.0)


@triton.jit
def store_rows(
    x, value, start, count, head, HEADS: tl.constexpr, D: tl.constexpr,
    first, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_rows`, rounding to x's dtype."""
    r, d = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    at = x + ((start * HEADS + head) * D + first) + (r * (HEADS * D) + d)
    tl.store(at, narrow(value, x.dtype.element_ty), mask=(r < count) & (first + d < D))


@triton.jit
def store_columns(
    x, value, start, count, head, HEADS: tl.constexpr, D: tl.constexpr,
    first, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The same from the transpose, [BD, C]."""
    r, d = tl.arange(0, C)[None, :], tl.arange(0, BD)[:, None]
    at = x + ((start * HEADS + head) * D + first) + (r * (HEADS * D) + d)
    tl.store(at, narrow(value, x.dtype.element_ty), mask=(r < count) & (first + d < D))


@triton.jit
def load_scalars(x, start, count, head, HEADS: tl.constexpr, C: tl.constexpr):
    """x[start:start + C, head] of [tokens, HEADS] in float32, zero past count."""
    r = tl.arange(0, C)
    return tl.load(x + start * HEADS + head + r * HEADS, mask=r < count, other=0.0).to(tl.float32)


@triton.jit
def store_scalars(x, value, start, count, head, HEADS: tl.constexpr, C: tl.constexpr):
    """The inverse of `load_scalars`."""
    r = tl.arange(0, C)
    at = x + start * HEADS + head + r * HEADS
    tl.store(at, narrow(value, x.dtype.element_ty), mask=r < count)


@triton.jit
def load_factor(factors, block, which: tl.constexpr, C: tl.constexpr):
    """One row [C] of `factors` at block = slot * HV + head."""
    return tl.load(factors + (block * FACTORS + which) * C + tl.arange(0, C))


@triton.jit
def store_factor(factors, value, block, which: tl.constexpr, C: tl.constexpr):
    """The inverse of `load_factor`."""
    tl.store(factors + (block * FACTORS + which) * C + tl.arange(0, C), value)


@triton.jit
def chunk_decay(factors, block, C: tl.constexpr):
    """e^gamma: the decay over a whole chunk."""
    return tl.exp(tl.load(factors + (block * FACTORS + LOG_DECAY) * C + C - 1))


@triton.jit
def load_matrix(x, block, first, ROWS: tl.constexpr, BR: tl.constexpr, C: tl.constexpr):
    """Rows first:first + BR of matrix number `block` of [.., ROWS, C], zero past ROWS."""
    r, c = first + tl.arange(0, BR)[:, None], tl.arange(0, C)[None, :]
    at = x + block * (ROWS * C) + (r * C + c)
    return tl.load(at) if ROWS % BR == 0 else tl.load(at, mask=(r < ROWS) & (c >= 0), other=0.0)


@triton.jit
def store_matrix(x, value, block, first, ROWS: tl.constexpr, BR: tl.constexpr, C: tl.constexpr):
    """The inverse of `load_matrix`, rounding to x's dtype."""
    r, c = first + tl.arange(0, BR)[:, None], tl.arange(0, C)[None, :]
    at = x + block * (ROWS * C) + (r * C + c)
    tl.store(at, narrow(value, x.dtype.element_ty), mask=(r < ROWS) & (c >= 0))


@triton.jit
def tile_offsets(
    block, first, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    V_FIRST: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of the [BV, BK] tile from `first` of V, in a state [.., V, K] (or K, V)."""
    i, j = tl.arange(0, BK)[None, :], first + tl.arange(0, BV)[:, None]
    inner = (j * K + i) if V_FIRST else (i * V + j)
    return block * (K * V) + inner, (i < K) & (j < V)


@triton.jit
def load_state(
    states, block, first, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """[BV, BK]: rows from `first` of a kept state [V, K]."""
    at, inside = tile_offsets(block, first, K, V, BK, BV, True)
    if K == BK and V % BV == 0:
        return tl.load(states + at)
    return tl.load(states + at, mask=inside, other=0.0)


@triton.jit
def log_decay(x, A_log):
    """-exp(A_log) softplus(x). With y = e^-|x|, softplus(x) is x + log(1 + y) or, below zero, e^x
    times log(1 + y) / y; that e^x goes into the other exponential, since one factor may overflow
    where the other vanishes."""
    y = tl.exp(-tl.abs(x))
    below = tl.where(y < 1e-4, 1 - y / 2, tl.log(1 + y) / y)
    return -tl.exp(A_log + tl.minimum(x, 0.0)) * tl.where(x > 0, x + tl.log(1 + y), below)


@triton.jit
def log_decay_slope(x, A_log):
    """Its derivative, -exp(A_log) sigmoid(x)."""
    return -tl.exp(A_log + tl.minimum(x, 0.0)) / (1 + tl.exp(-tl.abs(x)))


@triton.jit
def through_norm(grad, x, r):
    """The gradient of x given that of y = r x, r = 1 / sqrt(sum x^2 + eps)."""
    y = r[:, None] * x
    return r[:, None] * (grad - y * tl.sum(y * grad, axis=1)[:, None])


@triton.jit
def decay_matrix(G, C: tl.constexpr):
    """L_ij = exp(G_i - G_j) for i >= j, zero above; masked before the exponential."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    between = (G[:, None] - G[None, :]).to(tl.float32)
    return tl.exp(tl.where(i >= j, between, -float("inf")))


@triton.jit
def last_of(G, C: tl.constexpr):
    """The last element of G [C], to the bit."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, G, 0.0), axis=0)


@triton.jit
def load_sums(factors, block, C: tl.constexpr, dtype: tl.constexpr):
    """G of a chunk, for differences of its elements: all that is kept of it."""
    G = load_factor(factors, block, LOG_DECAY, C)
    if dtype == tl.float32:
        G = G.to(tl.float64) + load_factor(factors, block, REST, C)
    return G


@triton.jit
def strictly_lower(x, C: tl.constexpr):
    """x with its diagonal and all above set to zero."""
    return tl.where(tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :], x, 0.0)


@triton.jit
def invert(M, C: tl.constexpr, dtype: tl.constexpr):
    """(I + M)^-1 for strictly lower M [C, C], in float32.

    Forward substitution on the diagonal blocks of 8, all at once; then neighbours are merged, three
    times: with X the inverse of the block diagonal and F what M holds between two neighbours,
    X - X F X is the inverse at twice the block size. The operands of these products keep float16's
    ten bits where the result is for bfloat16, and float32's otherwise.
    """
    SIZE: tl.constexpr = 8
    N: tl.constexpr = C // SIZE
    merged: tl.constexpr = tl.float16 if dtype == tl.bfloat16 else tl.float32
    block, other = tl.arange(0, N)[:, None, None, None], tl.arange(0, N)[None, None, :, None]
    row, column = tl.arange(0, SIZE)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    diagonal = tl.sum(tl.where(block == other, tl.reshape(M, [N, SIZE, N, SIZE]), 0.0), axis=2)
    X = tl.where(row == column, 1.0, 0.0) + diagonal * 0
    for i in range(1, SIZE):
        factors = tl.sum(tl.where(row == i, diagonal, 0.0), axis=1)  # [N, SIZE]
        known = tl.sum(factors[:, :, None] * X, axis=1)  # [N, SIZE]
        X = tl.where(row == i, X - known[:, None, :], X)
    X = tl.reshape(tl.where(block == other, X[:, :, None, :], 0.0), [C, C])
    r, c = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for step in tl.static_range(3):
        size = SIZE << step
        between = (r // size != c // size) & (r // (2 * size) == c // (2 * size))
        F = tl.where(between, M, 0.0).to(merged)
        X -= dot(dot(X.to(merged), F).to(merged), X.to(merged))
    return X
