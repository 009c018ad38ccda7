"""The inverse A = (I + M)^-1 of a chunk, by blocks of 16 rows and columns.

M is [C, C] and strictly lower triangular. M_kj stands for its blocks [16, 16], A_kj for those of A.

    A_kk = D - D L D    where D has the inverses of the two diagonal blocks [8, 8] of I + M_kk,
                        by substitution in float32, and L the block of M_kk below them
    A_rj = (sum_k A_rk (-M_kj)) A_jj  for j < k <= r    from j = r - 1 down to 0

A row of blocks needs no other one, only M and the A_jj. So each warp computes the row of blocks of
its 16 rows, after one barrier. The products are those of the tensor cores (`mma`), with float16
operands, or with operands of two parts: x = high + low, both bfloat16. Then a product is three:
high high + high low + low high, which keeps 16 bits of the mantissa and the range of float32. Two
parts are needed where entries of M exceed 1, and for results in float16.

A stored block is 512 bytes a part: four tiles of 8 x 8, left ones first, in which a row follows the
other. So lane n of a warp reads and writes from byte 16 n on.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragments import PAIRS

BLOCK = 16
BLOCKS = C // BLOCK
BELOW = BLOCKS * (BLOCKS - 1) // 2
"""Blocks below the diagonal. Block (k, j) is number k (k - 1) / 2 + j."""

PRELUDE = """
#include <tl_templates/cuda/ldsm.h>
#include <tl_templates/cuda/instruction/mma.h>
// x, so that nothing computed from it stays in registers from one chunk to the next.
__device__ __forceinline__ int gdn_opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// A block as a warp has it in registers: 8 numbers a lane, as left operand or as it is stored. One
// part: float16. Two: what bfloat16 keeps of a number, and what it keeps of the rest.
template <int parts> struct GdnBlock {
  unsigned x[parts][4];
  __device__ __forceinline__ static void narrow(float a, float b, unsigned *to, int stride) {
    if (parts == 1) {
      half2 pair = gdn_narrow<half2>(make_float2(a, b));
      to[0] = *reinterpret_cast<unsigned *>(&pair);
    } else {
      auto pair = gdn_narrow<__nv_bfloat162>(make_float2(a, b));
      float2 kept = gdn_widen(pair);
      auto rest = gdn_narrow<__nv_bfloat162>(make_float2(a - kept.x, b - kept.y));
      to[0] = *reinterpret_cast<unsigned *>(&pair);
      to[stride] = *reinterpret_cast<unsigned *>(&rest);
    }
  }
  __device__ __forceinline__ void set(const float *from) {
#pragma unroll
    for (int n = 0; n < 4; ++n) narrow(from[2 * n], from[2 * n + 1], &x[0][n], 4);
  }
  __device__ __forceinline__ void get(float *to) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float2 pair = make_float2(0, 0);
#pragma unroll
      for (int p = 0; p < parts; ++p) {
        float2 more = parts == 1
            ? gdn_widen(*reinterpret_cast<const half2 *>(&x[p][n]))
            : gdn_widen(*reinterpret_cast<const __nv_bfloat162 *>(&x[p][n]));
        pair.x += more.x, pair.y += more.y;
      }
      to[2 * n] = pair.x, to[2 * n + 1] = pair.y;
    }
  }
  __device__ __forceinline__ void load(const uint4 *from) {
#pragma unroll
    for (int p = 0; p < parts; ++p) tl::ptx_ldmatrix_x4(from + 32 * p + threadIdx.x % 32, x[p]);
  }
  __device__ __forceinline__ void load_right(const uint4 *from) {
#pragma unroll
    for (int p = 0; p < parts; ++p)
      tl::ptx_ldmatrix_x4_trans(from + 32 * p + threadIdx.x % 32, x[p]);
  }
  __device__ __forceinline__ void store(uint4 *to) const {
#pragma unroll
    for (int p = 0; p < parts; ++p)
      tl::ptx_stmatrix_m8n8_x4(
          to + 32 * p + threadIdx.x % 32, x[p][0], x[p][1], x[p][2], x[p][3]);
  }
};
template <int parts>
__device__ __forceinline__ void gdn_mma(float *sum, const unsigned *a, const unsigned *b) {
  constexpr auto type = parts == 1 ? tl::DataType::kFloat16 : tl::DataType::kBFloat16;
  tl::mma_sync<type, type, tl::DataType::kFloat32, 16, 8, 16, false, true>(sum, a, b);
}
// sum += a b: columns 8 half to 8 half + 7 of the product; b was loaded by `load_right`.
template <int parts>
__device__ __forceinline__ void gdn_multiply(
    float *sum, const GdnBlock<parts> &a, const GdnBlock<parts> &b, int half) {
  if (parts == 2) {
    gdn_mma<parts>(sum + 4 * half, a.x[parts - 1], b.x[0] + 2 * half);
    gdn_mma<parts>(sum + 4 * half, a.x[0], b.x[parts - 1] + 2 * half);
  }
  gdn_mma<parts>(sum + 4 * half, a.x[0], b.x[0] + 2 * half);
}
// A block on the diagonal of (I + M)^-1, from 8 numbers of M a lane. `scratch`: [2][8][8] float32.
template <int parts>
__device__ __forceinline__ void gdn_invert_diagonal(const float *M, void *scratch, void *to) {
  int lane = gdn_opaque(threadIdx.x % 32), row = lane % 8;
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
  D.load(block);
  right.load_right(block);
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
  D.store(block);
}
// A lane's 8 numbers of a block, times beta of their columns, to `to`, where the lane's row of 8
// numbers begins.
template <class Pair>
__device__ __forceinline__ void gdn_put_block(const float *x, const float *beta, void *to) {
  unsigned word[4];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float2 b = reinterpret_cast<const float2 *>(beta + 8 * n)[threadIdx.x % 4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float *from = x + 4 * n + 2 * m;
      Pair pair = gdn_narrow<Pair>(make_float2(from[0] * b.x, from[1] * b.y));
      word[2 * n + m] = *reinterpret_cast<unsigned *>(&pair);
    }
  }
  tl::ptx_stmatrix_m8n8_x4(to, word[0], word[1], word[2], word[3]);
}
// A row of blocks of A diag(beta), up to the diagonal, to a tile [64][64] that has the swizzle of
// 128 bytes. All warps run the same code, without a branch: of columns left of the tile it reads
// any block, and what it computes goes to `dump`.
template <int parts, class Pair>
__device__ __forceinline__ void gdn_solve_row(
    const void *below, const void *diagonal, const void *beta, void *tile, void *dump, int row) {
  auto M = static_cast<const uint4 *>(below), X = static_cast<const uint4 *>(diagonal);
  row = gdn_opaque(row);
  int lane = threadIdx.x % 32, token = 16 * row + lane % 16;
  float sum[4][8];
#pragma unroll
  for (int n = 0; n < 32; ++n) sum[n / 8][n % 8] = 0;
  GdnBlock<parts> left, right;
#pragma unroll
  for (int d = 0; d < 4; ++d) {  // column `row - d`
    int column = row < d ? 0 : row - d;
    if (d == 0) {
      left.load(X + 32 * parts * row);
      left.get(sum[0]);
    } else {
      left.set(sum[d]);
      right.load_right(X + 32 * parts * column);
#pragma unroll
      for (int n = 0; n < 8; ++n) sum[d][n] = 0;
      for (int half = 0; half < 2; ++half) gdn_multiply(sum[d], left, right, half);
      if (d < 3) left.set(sum[d]);
    }
#pragma unroll
    for (int e = d + 1; e < 4; ++e) {
      right.load_right(M + 32 * parts * (row < e ? 0 : column * (column - 1) / 2 + row - e));
      for (int half = 0; half < 2; ++half) gdn_multiply(sum[e], left, right, half);
    }
    uint4 *place = static_cast<uint4 *>(tile) + 8 * token + (2 * column + lane / 16 ^ token % 8);
    gdn_put_block<Pair>(
        sum[d], static_cast<const float *>(beta) + 16 * column,
        row < d ? static_cast<uint4 *>(dump) + lane : place);
  }
}
"""


class BlockInverseSmem:
    """Shared memory of the inverses of two chunks: a warp may be one chunk ahead of another."""

    def __init__(self, parts: int) -> None:
        stored = parts * BLOCK * BLOCK
        self.below = T.alloc_shared((2, BELOW, stored), "float16")  # -M, below the diagonal
        self.A_diagonal = T.alloc_shared((2, BLOCKS, stored), "float16")
        self.scratch = T.alloc_shared((BLOCKS, 2 * 8 * 8), "float32")  # a warp's own


@T.macro
def solve_row(
    parts: int, inv: Any, buffer: Any, beta: Any, A_v: Any, warp: Any, dtype: str
) -> None:
    """A warp's rows of A diag(beta), up to the diagonal block. beta: address of C numbers; A_v: of
    a tile [C, C] of `dtype` with the swizzle of 128 bytes."""
    T.call_extern(
        "handle", f"gdn_solve_row<{parts}, {PAIRS[dtype]}>",
        T.address_of(inv.below[buffer, 0, 0]), T.address_of(inv.A_diagonal[buffer, 0, 0]), beta,
        A_v, T.address_of(inv.scratch[warp, 0]), warp,
    )  # fmt: skip
