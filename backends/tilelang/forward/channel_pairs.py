"""Dot products of a chunk's tokens that decay on the way, each channel by itself.

    pairs(x, k)_ij = sum_c x_ic k_jc D_ijc for i > j,    D_ijc = prod_{j < t <= i} a_tc,    a = e^g

A level divides the chunk into blocks of 2 h tokens, h = 1, 2, .. 32. Every pair i > j has one level
at which i lies in the right half of a block and j in its left half. There D_ij = f_i f_j, with

    f_i = prefix_i, the product of a from the first token of the right half to i
    f_j = suffix_j, the product of a from after j to the last token of the left half

so the pairs of a level are a matrix product of rows that are multiplied by f. The prefixes and
suffixes of a level follow from those of the level below by one multiplication. Nothing is divided
(but in `near_pairs.py`), and no sums of g are subtracted: this holds for every g <= 0, -inf
included. Factors are at most 1, and one underflows only where D is smaller still.

A thread has two channels of K / 8 tokens that follow each other, and their factors in registers:
[K / 8][2]. Levels up to h = K / 16 need no other thread. Those above need the products of a over
the tokens of each thread, `totals`.

Rows times f are bfloat16 in shared memory, with the 16 bytes of a row in the order of the 128-byte
swizzle. In float16 calls they have two parts, x = high + low, which keeps 16 bits of the mantissa
and the range of float32. A warp multiplies 16 rows by 16 rows (`mma`).
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from ..tile.fragments import PAIRS
from .row_norms import TYPES

NEAR, FAR = (1, 2, 4, 8), (16, 32)
"""h of the levels within blocks of 16 tokens (`near_pairs.py`), and of the others."""

PRELUDE = """
// Where a row of a tile [64][K] of bfloat16 has its 16 bytes number `unit`.
template <int K>
__device__ __forceinline__ const uint4 *gdn_unit(const void *tile, int row, int unit) {
  return static_cast<const uint4 *>(tile) + row * (K / 8) + (unit ^ row % 8);
}
// Two channels of a row times f, to a tile. Parts of a number lie a tile apart.
template <int K, int parts>
__device__ __forceinline__ void gdn_put_pair(float2 x, float2 f, void *tile, int row, int pair) {
  x = make_float2(x.x * f.x, x.y * f.y);
  auto to = (__nv_bfloat162 *)gdn_unit<K>(tile, row, pair / 4) + pair % 4;
#pragma unroll
  for (int p = 0; p < parts; ++p) {
    auto rounded = gdn_narrow<__nv_bfloat162>(x);
    to[p * 32 * K] = rounded;
    float2 kept = gdn_widen(rounded);
    x = make_float2(x.x - kept.x, x.y - kept.y);
  }
}
// Rows of a level, multiplied by their factors: k's, and q's in right halves. q, k: [64][K].
template <int h, int K, int parts, class Pair>
__device__ __forceinline__ void gdn_put_level(
    const float *prefix, const float *suffix, const void *q, const void *k, void *q_rows,
    void *k_rows) {
  constexpr int tokens = K / 8;
  int first = threadIdx.x / (K / 2) * tokens, pair = threadIdx.x % (K / 2);
#pragma unroll
  for (int i = 0; i < tokens; ++i) {
    int at = (first + i) * (K / 2) + pair;
    bool right = h < tokens ? i & h : first & h;
    // not a pointer to one of them, which would put them into local memory
    float2 f = make_float2(
        right ? prefix[2 * i] : suffix[2 * i], right ? prefix[2 * i + 1] : suffix[2 * i + 1]);
    gdn_put_pair<K, parts>(gdn_widen(static_cast<const Pair *>(k)[at]), f, k_rows, first + i, pair);
    if (right)
      gdn_put_pair<K, parts>(
          gdn_widen(static_cast<const Pair *>(q)[at]), f, q_rows, first + i, pair);
  }
}
// From factors of blocks of h tokens to those of blocks of 2 h.
template <int h, int K>
__device__ __forceinline__ void gdn_join_halves(float *prefix, float *suffix, void *totals_) {
  constexpr int tokens = K / 8;
  if (h < tokens) {
#pragma unroll
    for (int i = 0; i < tokens; i += 2 * h)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float left = prefix[2 * (i + h - 1) + c], right = prefix[2 * (i + 2 * h - 1) + c];
#pragma unroll
        for (int n = 0; n < h; ++n) {
          suffix[2 * (i + n) + c] *= right;
          prefix[2 * (i + h + n) + c] *= left;
        }
      }
    return;
  }
  auto totals = static_cast<const float2 *>(totals_) + threadIdx.x % (K / 2);
  constexpr int groups = h / tokens > 0 ? h / tokens : 1;
  int group = threadIdx.x / (K / 2), other = (group / groups ^ 1) * groups;
  float2 total = make_float2(1, 1);
#pragma unroll
  for (int n = 0; n < groups; ++n) {
    float2 more = totals[(other + n) * (K / 2)];
    total.x *= more.x, total.y *= more.y;
  }
  bool right = group & groups;
#pragma unroll
  for (int i = 0; i < tokens; ++i) {
    prefix[2 * i] *= right ? total.x : 1, prefix[2 * i + 1] *= right ? total.y : 1;
    suffix[2 * i] *= right ? 1 : total.x, suffix[2 * i + 1] *= right ? 1 : total.y;
  }
}
// sums += 16 rows times 16 rows of tiles by `gdn_put_pair`; 8 numbers a lane, as `mma` leaves them.
template <int K, int parts>
__device__ __forceinline__ void gdn_multiply_rows(
    float *sums, const void *left, int row, const void *right, int column) {
  int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int unit = 0; unit < K / 8; unit += 2) {
    unsigned a[parts][4], b[parts][4];
#pragma unroll
    for (int p = 0; p < parts; ++p) {
      tl::ptx_ldmatrix_x4(gdn_unit<K>(left, row + lane % 16, unit + lane / 16) + p * 8 * K, a[p]);
      tl::ptx_ldmatrix_x4(
          gdn_unit<K>(right, column + lane % 16, unit + lane / 16) + p * 8 * K, b[p]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int p = 0; p < 2 * parts - 1; ++p) {  // high high; high low and low high
        const unsigned *right = b[p % 2];
        unsigned pair[2] = {right[half], right[half + 2]};
        constexpr auto type = tl::DataType::kBFloat16;
        tl::mma_sync<type, type, tl::DataType::kFloat32, 16, 8, 16, false, true>(
            sums + 4 * half, a[p / 2], pair);
      }
  }
}
// Add the pairs of a level to a warp's sums: of the block on the diagonal (levels below 16), of the
// block left of it (16), or of two blocks (32). The first four warps have 16 rows of q each, the
// other four those of k.
template <int h, int K, int parts>
__device__ __forceinline__ void gdn_add_level(float *sums, const void *q_rows, const void *k_rows) {
  const void *left = threadIdx.x < 128 ? q_rows : k_rows, *right = k_rows;
  int row = gdn_opaque(threadIdx.x / 32 % 4);
  if (h < 16) {
    float all[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    gdn_multiply_rows<K, parts>(all, left, 16 * row, right, 16 * row);
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      int i = lane / 4 + n / 2 % 2 * 8, j = lane % 4 * 2 + n % 2 + n / 4 * 8;
      if ((i & h) && (i ^ j) / h == 1) sums[n] += all[n];
    }
  } else if (row & h / 16) {
#pragma unroll
    for (int b = 0; b < h / 16; ++b)
      gdn_multiply_rows<K, parts>(
          sums + h / 2 + 8 * b, left, 16 * row, right, 16 * (h == 16 ? row - 1 : b));
  }
}
// A warp's rows of a fragment [64, 64] from the sums of its blocks: 8 on the diagonal, 8 left of
// it, 16 of the first two columns; with factors of rows and columns.
__device__ __forceinline__ void gdn_join_blocks(
    const float *sums, const void *rows, const void *columns, float *to, int row) {
  int lane = threadIdx.x % 32;
  const float *factor = static_cast<const float *>(rows) + 16 * row + lane / 4;
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    int b = n / 8;
    float x = row >= 2 && b < 2 ? sums[16 + n % 16] : 0;
    if (row % 2 && b == row - 1) x = sums[8 + n % 8];
    if (b == row) x = sums[n % 8];
    int column = 16 * b + n % 8 / 4 * 8 + lane % 4 * 2 + n % 2;
    to[n] = x * factor[n / 2 % 2 * 8] * static_cast<const float *>(columns)[column];
  }
}
// The diagonal of P: products of rows of q and k, times the factors of rows and columns.
template <int K, tl::DataType type>
__device__ __forceinline__ void gdn_put_diagonal(
    const void *q, const void *k, const void *rows, const void *columns, float *to, int row) {
  int lane = threadIdx.x % 32;
  float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
  for (int step = 0; step < K / 16; ++step) {
    unsigned a[4], b[4];
    int at = (16 * row + lane % 16) * (K / 8) + 2 * step + lane / 16;
    tl::ptx_ldmatrix_x4(static_cast<const uint4 *>(q) + at, a);
    tl::ptx_ldmatrix_x4(static_cast<const uint4 *>(k) + at, b);
    unsigned upper[2] = {b[0], b[2]}, lower[2] = {b[1], b[3]};
    tl::mma_sync<type, type, tl::DataType::kFloat32, 16, 8, 16, false, true>(sums, a, upper);
    tl::mma_sync<type, type, tl::DataType::kFloat32, 16, 8, 16, false, true>(sums + 4, a, lower);
  }
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    int i = 16 * row + lane / 4 + n / 2 % 2 * 8;
    int j = 16 * (n / 8) + n % 8 / 4 * 8 + lane % 4 * 2 + n % 2;
    float factor = static_cast<const float *>(rows)[i] * static_cast<const float *>(columns)[j];
    if (i == j) to[n] = sums[n % 8] * factor;
  }
}
// A warp's rows of a fragment [64, 64] to a tile that has the swizzle of 128 bytes.
template <class Pair>
__device__ __forceinline__ void gdn_put_rows(
    const float *x, const void *ones, void *tile, int row) {
  int lane = threadIdx.x % 32, token = 16 * row + lane % 16;
#pragma unroll
  for (int b = 0; b < 4; ++b)
    gdn_put_block<Pair>(
        x + 8 * b, static_cast<const float *>(ones),
        static_cast<uint4 *>(tile) + 8 * token + (2 * b + lane / 16 ^ token % 8), lane);
}
"""


@T.macro
def put_level(h: int, K: int, parts: int, smem: Any, prefix: Any, suffix: Any) -> None:
    """Store the rows of a level to smem.q_rows and smem.k_rows."""
    T.call_extern(
        "handle", f"gdn_put_level<{h}, {K}, {parts}, {PAIRS[smem.q.dtype]}>", prefix.data,
        suffix.data, T.address_of(smem.q[0, 0, 0]), T.address_of(smem.k[0, 0, 0]),
        T.address_of(smem.q_rows[0, 0, 0]), T.address_of(smem.k_rows[0, 0, 0]),
    )  # fmt: skip


@T.macro
def add_level(h: int, K: int, parts: int, smem: Any, sums: Any) -> None:
    """Add the pairs of a level to a warp's sums."""
    T.call_extern(
        "handle", f"gdn_add_level<{h}, {K}, {parts}>", sums.data,
        T.address_of(smem.q_rows[0, 0, 0]), T.address_of(smem.k_rows[0, 0, 0]),
    )  # fmt: skip


@T.macro
def join_halves(h: int, K: int, smem: Any, prefix: Any, suffix: Any, thread: Any) -> None:
    """From the factors of blocks of h tokens to those of blocks of 2 h. A thread stores the decay
    over all of its tokens to `totals`, which higher levels read."""
    T.call_extern(
        "handle", f"gdn_join_halves<{h}, {K}>", prefix.data, suffix.data,
        T.address_of(smem.totals[0, 0]),
    )  # fmt: skip
    if 2 * h == K // 8:
        for c in T.unroll(2):
            smem.totals[thread // (K // 2), thread % (K // 2) * 2 + c] = prefix[K // 4 - 2 + c]


@T.macro
def join_blocks(sums: Any, rows: Any, columns: Any, to: Any, row: Any) -> None:
    """A warp's rows of a matrix from its sums. rows, columns: addresses of factors."""
    T.call_extern("handle", "gdn_join_blocks", sums.data, rows, columns, to.data, row)


@T.macro
def put_diagonal(K: int, smem: Any, rows: Any, columns: Any, to: Any, row: Any) -> None:
    """The diagonal of P, to a warp's rows of it."""
    T.call_extern(
        "handle", f"gdn_put_diagonal<{K}, {TYPES[smem.q.dtype]}>", T.address_of(smem.q[0, 0, 0]),
        T.address_of(smem.k[0, 0, 0]), rows, columns, to.data, row,
    )  # fmt: skip


@T.macro
def put_matrix(x: Any, ones: Any, tile: Any, row: Any) -> None:
    """Store a warp's rows of a matrix to a tile [1, C, C]. ones: address of C ones."""
    T.call_extern(
        "handle", f"gdn_put_rows<{PAIRS[tile.dtype]}>", x.data, ones,
        T.address_of(tile[0, 0, 0]), row,
    )  # fmt: skip
