"""A diag(beta) of a chunk, by a warpgroup, from -M below the diagonal, here N, and the A_kk.

    A_10 = A_11 N_10 A_00,  A_32 = A_33 N_32 A_22
    W_2k = A_22 N_2k,  W_3k = A_33 N_3k + A_32 N_2k    for k = 0, 1
    A_r1 = W_r1 A_11,  A_r0 = W_r0 A_00 + W_r1 A_10    for r = 2, 3

`fused_intra_chunk.py` begins. `gdn_solve_row` of `block_inverse.py` computes the same, each warp
for itself. Here warps wait for each other once, for the first line, and share the work. That is a
third fewer instructions, in the warpgroup that the others of `fused.py` wait for.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from ..tile.fragments import PAIRS

PRELUDE = """
// sum += a b, for whole blocks.
template <int parts>
__device__ __forceinline__ void gdn_multiply_blocks(
    float *sum, const GdnBlock<parts> &a, const GdnBlock<parts> &b) {
  gdn_multiply(sum, a, b, 0);
  gdn_multiply(sum, a, b, 1);
}
// By warp `warp`: A_ww to the tile; half of the columns of A_10 or A_32 to `merged` and to the
// tile; and W without A_32: 8 numbers of W_r0, then of W_r1, for r = 2 + warp / 2. If there is a
// tile A, it gets A itself.
template <int parts, class Pair>
__device__ __forceinline__ void gdn_begin_merge(
    const void *below, const void *diagonal, void *merged, const void *strengths, void *tile,
    float *W, unsigned warp, unsigned lane, void *A = nullptr) {
  auto N = static_cast<const uint4 *>(below), X = static_cast<const uint4 *>(diagonal);
  auto beta = static_cast<const float *>(strengths);
  warp = gdn_opaque(warp);
  unsigned pair = warp / 2, half = warp % 2;
  GdnBlock<parts> left, right;
  float x[8];
  left.load(X + 32 * parts * (2 * pair + 1), lane);
  right.load_right(N + 32 * parts * (5 * pair), lane);
#pragma unroll
  for (int n = 0; n < 8; ++n) x[n] = 0;
  gdn_multiply_blocks(x, left, right);
  left.set(x);
  right.load_right(X + 32 * parts * (2 * pair), lane);
#pragma unroll
  for (int p = 0; p < parts; ++p)
#pragma unroll
    for (int n = 0; n < 2; ++n) right.x[p][n] = half ? right.x[p][2 + n] : right.x[p][n];
#pragma unroll
  for (int n = 0; n < 4; ++n) x[n] = 0;
  gdn_multiply(x, left, right, 0);
  auto *to = static_cast<unsigned *>(merged) + 128 * parts * pair + 64 * half;
  float2 b = reinterpret_cast<const float2 *>(beta + 32 * pair + 8 * half)[lane % 4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    unsigned word[parts], token = 32 * pair + 16 + 8 * m + lane / 4;
    GdnBlock<parts>::narrow(x[2 * m], x[2 * m + 1], word, 1);
#pragma unroll
    for (int p = 0; p < parts; ++p) to[128 * p + 32 * m + lane] = word[p];
    unsigned place = 8 * token + (4 * pair + half ^ token % 8);
    Pair scaled = gdn_narrow<Pair>(make_float2(x[2 * m] * b.x, x[2 * m + 1] * b.y));
    reinterpret_cast<unsigned *>(static_cast<uint4 *>(tile) + place)[lane % 4] =
        *reinterpret_cast<unsigned *>(&scaled);
    if (A) {
      Pair own = gdn_narrow<Pair>(make_float2(x[2 * m], x[2 * m + 1]));
      reinterpret_cast<unsigned *>(static_cast<uint4 *>(A) + place)[lane % 4] =
          *reinterpret_cast<unsigned *>(&own);
    }
  }
  left.load(X + 32 * parts * warp, lane);
  left.get(x);
  gdn_put_block<Pair>(x, beta + 16 * warp, gdn_row_of_block(tile, warp, warp, lane), lane);
  if (A) gdn_put_block<Pair, false>(x, beta, gdn_row_of_block(A, warp, warp, lane), lane);
  left.load(X + 32 * parts * (2 + pair), lane);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    right.load_right(N + 32 * parts * (1 + 2 * pair + k), lane);
#pragma unroll
    for (int n = 0; n < 8; ++n) W[8 * k + n] = 0;
    gdn_multiply_blocks(W + 8 * k, left, right);
  }
}
// By warp `warp`, after all have begun: block (2 + warp / 2, warp % 2) to the tile, or tiles.
template <int parts, class Pair>
__device__ __forceinline__ void gdn_end_merge(
    const void *below, const void *diagonal, const void *merged, const void *strengths, void *tile,
    float *W, unsigned warp, unsigned lane, void *A = nullptr) {
  auto N = static_cast<const uint4 *>(below), X = static_cast<const uint4 *>(diagonal);
  auto Y = static_cast<const uint4 *>(merged);
  warp = gdn_opaque(warp);
  unsigned pair = warp / 2, column = warp % 2;
  GdnBlock<parts> left, right;
  left.load(Y + 32 * parts, lane);
#pragma unroll
  for (int p = 0; p < parts; ++p)
#pragma unroll
    for (int n = 0; n < 4; ++n) left.x[p][n] = pair ? left.x[p][n] : 0;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    right.load_right(N + 32 * parts * (1 + k), lane);
    gdn_multiply_blocks(W + 8 * k, left, right);
  }
  float x[8];
#pragma unroll
  for (int n = 0; n < 8; ++n) x[n] = 0;
  left.set(W);
  right.load_right(X, lane);
#pragma unroll
  for (int p = 0; p < parts; ++p)
#pragma unroll
    for (int n = 0; n < 4; ++n) right.x[p][n] = column ? 0 : right.x[p][n];
  gdn_multiply_blocks(x, left, right);
  left.set(W + 8);
  right.load_right(column ? X + 32 * parts : Y, lane);
  gdn_multiply_blocks(x, left, right);
  gdn_put_block<Pair>(
      x, static_cast<const float *>(strengths) + 16 * column,
      gdn_row_of_block(tile, 2 + pair, column, lane), lane);
  if (A)
    gdn_put_block<Pair, false>(x, nullptr, gdn_row_of_block(A, 2 + pair, column, lane), lane);
}
"""
"""CUDA that goes before a kernel, after that of `block_inverse.py`."""


@T.macro
def merge(
    parts: int, inv: Any, beta: Any, A_v: Any, W: Any, warp: Any, lane: Any, dtype: str, *A: Any
) -> None:
    """A diag(beta), up to the diagonal block. beta: address of C numbers; A_v: of a tile [C, C] of
    `dtype` with the swizzle of 128 bytes; W: 16 registers; A: of another such tile, for A."""
    arguments = (
        T.address_of(inv.below[0, 0]), T.address_of(inv.A_diagonal[0, 0]),
        T.address_of(inv.scratch[0, 0]), beta, A_v, W.data, warp, lane, *A,
    )  # fmt: skip
    T.call_extern("handle", f"gdn_begin_merge<{parts}, {PAIRS[dtype]}>", *arguments)
    T.sync_threads(4, 128)
    T.call_extern("handle", f"gdn_end_merge<{parts}, {PAIRS[dtype]}>", *arguments)
