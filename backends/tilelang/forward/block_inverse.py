"""The inverse A = (I + M)^-1 of a chunk, by blocks of 16 rows and columns.

M is [C, C] and strictly lower triangular. M_kj stands for its blocks [16, 16], A_kj for those of A.

    A_kk = D - D L D    where D has the inverses of the two diagonal blocks [8, 8] of I + M_kk,
                        by substitution in float32, and L the block of M_kk below them
    A_rj = (sum_k A_rk (-M_kj)) A_jj  for j < k <= r    from j = r - 1 down to 0

A row of blocks needs no other one, only M and the A_jj. So each warp computes the row of blocks of
its 16 rows, after one barrier. The products have operands of one or two parts (`warp_blocks.py`).
Two are needed where entries of M exceed 1, and for results in float16. A kernel decides it for each
chunk, from a bound: |M_ij| <= max beta max k.k, where k.k is at most 1 after the L2 norm. Where a
beta is below 0, A may grow although M does not, and two parts have the range for it.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragments import PAIRS
from ..tile.largest import PRELUDE as LARGEST_PRELUDE
from .warp_blocks import BLOCK
from .warp_blocks import PRELUDE as BLOCKS_PRELUDE

BLOCKS = C // BLOCK
BELOW = BLOCKS * (BLOCKS - 1) // 2
"""Blocks below the diagonal. Block (k, j) is number k (k - 1) / 2 + j."""
LIMIT = 1 + 1 / 64
"""Above this bound of |M_ij|, operands have two parts. More than 1, since keys that are rounded
after the L2 norm may be longer than 1."""

PRELUDE = (
    LARGEST_PRELUDE
    + BLOCKS_PRELUDE
    + """
// The largest of 64 strengths beta, or infinity if one is below 0; for all lanes of a warp.
__device__ __forceinline__ float gdn_bound_strengths(const void *beta, unsigned lane) {
  float2 pair = static_cast<const float2 *>(beta)[lane];
  float larger = fabsf(fmaxf(pair.x, pair.y));
  if (!(fminf(pair.x, pair.y) >= 0)) larger = __uint_as_float(0x7f800000);
  return __uint_as_float(__reduce_max_sync(0xffffffff, __float_as_uint(larger)));
}
// A block on the diagonal of (I + M)^-1, from 8 numbers of M a lane. `scratch`: [2][8][8] float32.
template <int parts>
__device__ __forceinline__ void gdn_invert_diagonal(
    const float *M, void *scratch, void *to, unsigned lane) {
  lane = gdn_opaque(lane);
  unsigned row = lane % 8;
  auto *block = static_cast<uint4 *>(to);
  float2 *pairs = static_cast<float2 *>(scratch);
  pairs[lane] = make_float2(M[0], M[1]);
  pairs[32 + lane] = make_float2(M[6], M[7]);
  unsigned minus_L[parts];
  GdnBlock<parts>::narrow(-M[2], -M[3], minus_L, 1);
#pragma unroll
  for (int p = 0; p < parts; ++p)
    reinterpret_cast<unsigned *>(block + 32 * p + 8)[lane] = minus_L[p];
  __syncwarp();
  // a row of D: x (I + M) = a row of I. Lanes 16 to 31 do as lanes 0 to 15.
  const float4 *m = static_cast<const float4 *>(scratch) + lane / 8 % 2 * 16;
  float x[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = row == j;
#pragma unroll
  for (int k = 7; k > 0; --k) {
#pragma unroll
    for (int four = 0; four < (k + 3) / 4; ++four) {
      float4 m_k = m[k * 2 + four];
      x[4 * four] -= x[k] * m_k.x;
      if (4 * four + 1 < k) x[4 * four + 1] -= x[k] * m_k.y;
      if (4 * four + 2 < k) x[4 * four + 2] -= x[k] * m_k.z;
      if (4 * four + 3 < k) x[4 * four + 3] -= x[k] * m_k.w;
    }
  }
  GdnBlock<parts> D, right;
  D.set(x);
#pragma unroll
  for (int p = 0; p < parts; ++p)  // the upper left tile, and the lower right one
    block[32 * p + lane / 8 % 2 * 24 + row] =
        make_uint4(D.x[p][0], D.x[p][1], D.x[p][2], D.x[p][3]);
  __syncwarp();
  D.load(block, lane);
  right.load_right(block, lane);
  // -D L, and that times D: all in the lower left tile
  GdnBlock<parts> left;
  float product[4] = {0, 0, 0, 0};
#pragma unroll
  for (int p = 0; p < parts; ++p) {
    left.x[p][0] = left.x[p][1] = left.x[p][2] = 0, left.x[p][3] = D.x[p][3];
    D.x[p][2] = 0;
  }
  GdnBlock<parts> below = right;
#pragma unroll
  for (int p = 0; p < parts; ++p) below.x[p][0] = 0;
  gdn_multiply(product, left, below, 0);
#pragma unroll
  for (int p = 0; p < parts; ++p) left.x[p][3] = right.x[p][1] = 0;
  GdnBlock<parts>::narrow(product[2], product[3], &left.x[0][1], 4);
#pragma unroll
  for (int n = 0; n < 4; ++n) product[n] = 0;
  gdn_multiply(product, left, right, 0);
  GdnBlock<parts>::narrow(product[2], product[3], &D.x[0][1], 4);
  D.store(block, lane);
}
// Of what a lane has of a warp's rows of a fragment [64, 64]: the block on the diagonal.
__device__ __forceinline__ void gdn_diagonal(const float *x, unsigned warp, float *y) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    float low = warp % 2 ? x[8 + n] : x[n], high = warp % 2 ? x[24 + n] : x[16 + n];
    y[n] = warp < 2 ? low : high;
  }
}
// From a warp's rows of M: store the blocks of -M below the diagonal, and invert the one on it.
template <int parts>
__device__ __forceinline__ void gdn_begin_inverse(
    const float *M, void *below, void *scratch, void *diagonal, unsigned warp, unsigned lane) {
  warp = gdn_opaque(warp);
  uint4 *place = static_cast<uint4 *>(below) + 32 * parts * (warp * (warp - 1) / 2);
  float y[8];
#pragma unroll
  for (int b = 0; b < 3; ++b)
    if (b < warp) {
      GdnBlock<parts> block;
#pragma unroll
      for (int n = 0; n < 8; ++n) y[n] = -M[8 * b + n];
      block.set(y);
      block.store(place + 32 * parts * b, lane);
    }
  gdn_diagonal(M, warp, y);
  gdn_invert_diagonal<parts>(y, scratch, static_cast<uint4 *>(diagonal) + 32 * parts * warp, lane);
}
// Where a lane's row of 8 numbers begins, of block (row, column) of a tile [64][64] that has the
// swizzle of 128 bytes; for `gdn_put_block`.
__device__ __forceinline__ uint4 *gdn_row_of_block(
    void *tile, unsigned row, unsigned column, unsigned lane) {
  unsigned token = 16 * row + lane % 16;
  return static_cast<uint4 *>(tile) + 8 * token + (2 * column + lane / 16 ^ token % 8);
}
// A lane's 8 numbers of a block, times beta of their columns if they are scaled, to `to`, where the
// lane's row of 8 numbers begins.
template <class Pair, bool scaled = true>
__device__ __forceinline__ void gdn_put_block(
    const float *x, const float *beta, void *to, unsigned lane) {
  unsigned word[4];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float2 b = make_float2(1, 1);
    if (scaled) b = reinterpret_cast<const float2 *>(beta + 8 * n)[lane % 4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float *from = x + 4 * n + 2 * m;
      Pair pair = gdn_narrow<Pair>(make_float2(from[0] * b.x, from[1] * b.y));
      word[2 * n + m] = *reinterpret_cast<unsigned *>(&pair);
    }
  }
  tl::ptx_stmatrix_m8n8_x4(to, word[0], word[1], word[2], word[3]);
}
// A lane's 8 numbers of a block, or zeros, to block (row, column) of a matrix [64][64] in memory.
template <class Pair>
__device__ __forceinline__ void gdn_keep_block(
    const float *x, bool zero, Pair *matrix, int row, int column, unsigned lane) {
  Pair *to = matrix + 32 * (16 * row + lane / 4) + 8 * column + lane % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n)
    to[n % 2 * 256 + n / 2 * 4] =
        gdn_narrow<Pair>(zero ? make_float2(0, 0) : make_float2(x[2 * n], x[2 * n + 1]));
}
// A row of blocks of A diag(beta), up to the diagonal, to a tile [64][64] that has the swizzle of
// 128 bytes; if A is given, the row of A to this matrix in memory. All warps run the same code,
// without a branch: of columns left of the tile it reads any block, and what it computes goes to
// `dump`. In their place, memory gets the zeros above the diagonal.
template <int parts, class Pair>
__device__ __forceinline__ void gdn_solve_row(
    const void *below, const void *diagonal, const void *beta, void *tile, void *dump, unsigned row,
    unsigned lane, void *A = nullptr) {
  auto M = static_cast<const uint4 *>(below), X = static_cast<const uint4 *>(diagonal);
  row = gdn_opaque(row);
  float sum[4][8];
#pragma unroll
  for (int n = 0; n < 32; ++n) sum[n / 8][n % 8] = 0;
  GdnBlock<parts> left, right;
#pragma unroll
  for (int d = 0; d < 4; ++d) {  // column `row - d`
    unsigned column = row < d ? 0 : row - d;
    if (d == 0) {
      left.load(X + 32 * parts * row, lane);
      left.get(sum[0]);
    } else {
      left.set(sum[d]);
      right.load_right(X + 32 * parts * column, lane);
#pragma unroll
      for (int n = 0; n < 8; ++n) sum[d][n] = 0;
      for (int half = 0; half < 2; ++half) gdn_multiply(sum[d], left, right, half);
      if (d < 3) left.set(sum[d]);
    }
#pragma unroll
    for (int e = d + 1; e < 4; ++e) {
      right.load_right(
          M + 32 * parts * (row < e ? 0 : column * (column - 1) / 2 + row - e), lane);
      for (int half = 0; half < 2; ++half) gdn_multiply(sum[e], left, right, half);
    }
    uint4 *place = gdn_row_of_block(tile, row, column, lane);
    gdn_put_block<Pair>(
        sum[d], static_cast<const float *>(beta) + 16 * column,
        row < d ? static_cast<uint4 *>(dump) + lane : place, lane);
    if (A)
      gdn_keep_block(
          sum[d], row < d, static_cast<Pair *>(A), row, row < d ? row - d + 4 : column, lane);
  }
}
"""
)


class BlockInverseSmem:
    """Shared memory of the inverse of a chunk. parts: the most parts of operands."""

    def __init__(self, parts: int) -> None:
        stored = parts * BLOCK * BLOCK
        self.below = T.alloc_shared((BELOW, stored), "float16")  # -M, below the diagonal
        self.A_diagonal = T.alloc_shared((BLOCKS, stored), "float16")
        self.scratch = T.alloc_shared((BLOCKS, 2 * 8 * 8), "float32")  # a warp's own


def choose_parts(dtype: str, l2: bool, sigmoid: bool, double: bool) -> tuple[int, int]:
    """The least and the most parts of operands. l2, sigmoid, double: fused options of the call."""
    least = 2 if dtype == "float16" else 1
    return least, max(least, 1 if l2 and sigmoid and not double else 2)


@T.macro
def begin_inverse(parts: int, M: Any, inv: Any, warp: Any, lane: Any) -> None:
    """Store a warp's blocks of M below the diagonal, and of A on the diagonal; M is a fragment."""
    T.call_extern(
        "handle", f"gdn_begin_inverse<{parts}>", M.data, T.address_of(inv.below[0, 0]),
        T.address_of(inv.scratch[warp, 0]), T.address_of(inv.A_diagonal[0, 0]), warp, lane,
    )  # fmt: skip


def bound_strengths(beta: Any, lane: Any) -> Any:
    """For `LIMIT`: the largest of C strengths from an address on, or infinity if one is below 0; by
    whole warps."""
    return T.call_extern("float32", "gdn_bound_strengths", beta, lane)


@T.macro
def solve_row(
    parts: int, inv: Any, beta: Any, A_v: Any, warp: Any, lane: Any, dtype: str, *A: Any
) -> None:
    """A warp's rows of A diag(beta), up to the diagonal block. beta: address of C numbers; A_v: of
    a tile [C, C] of `dtype` with the swizzle of 128 bytes; A: of a matrix in memory for A."""
    T.call_extern(
        "handle", f"gdn_solve_row<{parts}, {PAIRS[dtype]}>",
        T.address_of(inv.below[0, 0]), T.address_of(inv.A_diagonal[0, 0]), beta, A_v,
        T.address_of(inv.scratch[warp, 0]), warp, lane, *A,
    )  # fmt: skip
