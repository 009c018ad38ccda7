"""The inverse A = (I + M)^-1 of a chunk, by blocks of 16 rows and columns.

M is [C, C] and strictly lower triangular. M_kj stands for its blocks [16, 16], A_kj for those of A.

    A_kk = (I + M_kk)^-1                              by substitution in float32
    A_rj = (sum_k A_rk (-M_kj)) A_jj  for j < k <= r   from j = r - 1 down to 0

A row of blocks needs no other one, only M and the A_jj. So each warp computes the row of blocks of
its 16 rows, after one barrier. The products are those of the tensor cores (`mma`). Their operands
are split: x = high + low, both bfloat16, and a product is three: high high + high low + low high.
That keeps 16 bits of the mantissa and the range of float32.

A stored block is 1 KB: high, then low; each is four tiles of 8 x 8, left ones first, in which a row
follows the other. So lane n of a warp reads and writes from byte 16 n on.
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
STORED = 2 * BLOCK * BLOCK
"""Numbers of a stored block: high and low."""

PRELUDE = """
#include <tl_templates/cuda/ldsm.h>
#include <tl_templates/cuda/instruction/mma.h>
// x and y as bfloat16 in one word, and what that leaves of them.
__device__ __forceinline__ void gdn_split(float x, float y, unsigned &high, unsigned &low) {
  __nv_bfloat162 pair = __float22bfloat162_rn(make_float2(x, y));
  float2 given = __bfloat1622float2(pair);
  __nv_bfloat162 rest = __float22bfloat162_rn(make_float2(x - given.x, y - given.y));
  high = *reinterpret_cast<unsigned *>(&pair);
  low = *reinterpret_cast<unsigned *>(&rest);
}
struct GdnBlock {  // of a warp: a block as left operand, or as it is stored
  unsigned high[4], low[4];
  __device__ __forceinline__ void set(const float *x) {
#pragma unroll
    for (int n = 0; n < 4; ++n) gdn_split(x[2 * n], x[2 * n + 1], high[n], low[n]);
  }
  __device__ __forceinline__ void load(const bfloat16_t *from) {
    tl::ptx_ldmatrix_x4(from + threadIdx.x % 32 * 8, high);
    tl::ptx_ldmatrix_x4(from + 256 + threadIdx.x % 32 * 8, low);
  }
  __device__ __forceinline__ void load_right(const bfloat16_t *from) {
    tl::ptx_ldmatrix_x4_trans(from + threadIdx.x % 32 * 8, high);
    tl::ptx_ldmatrix_x4_trans(from + 256 + threadIdx.x % 32 * 8, low);
  }
  __device__ __forceinline__ void store(bfloat16_t *to) const {
    tl::ptx_stmatrix_m8n8_x4(to + threadIdx.x % 32 * 8, high[0], high[1], high[2], high[3]);
    tl::ptx_stmatrix_m8n8_x4(to + 256 + threadIdx.x % 32 * 8, low[0], low[1], low[2], low[3]);
  }
  __device__ __forceinline__ void get(float *x) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float2 h = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(high + n));
      float2 l = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(low + n));
      x[2 * n] = h.x + l.x, x[2 * n + 1] = h.y + l.y;
    }
  }
};
__device__ __forceinline__ void gdn_mma(float *sum, const unsigned *a, const unsigned *b) {
  constexpr auto type = tl::DataType::kBFloat16, wide = tl::DataType::kFloat32;
  tl::mma_sync<type, type, wide, 16, 8, 16, false, true>(sum, a, b);
}
// sum [16, 16] += a b; b was loaded by `load_right`.
__device__ __forceinline__ void gdn_multiply_blocks(
    float *sum, const GdnBlock &a, const GdnBlock &b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    gdn_mma(sum + 4 * half, a.low, b.high + 2 * half);
    gdn_mma(sum + 4 * half, a.high, b.low + 2 * half);
    gdn_mma(sum + 4 * half, a.high, b.high + 2 * half);
  }
}
// Minus a block of M below the diagonal, from 8 numbers of each lane.
__device__ __forceinline__ void gdn_store_below(const float *x, void *to, int block) {
  float minus[8];
#pragma unroll
  for (int n = 0; n < 8; ++n) minus[n] = -x[8 * block + n];
  GdnBlock b;
  b.set(minus);
  b.store(static_cast<bfloat16_t *>(to));
}
// A block of M on the diagonal, [16][16] in float32.
__device__ __forceinline__ void gdn_store_diagonal(const float *x, void *to, int block) {
  float2 *rows = static_cast<float2 *>(to) + threadIdx.x % 32 / 4 * 8 + threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n)
    rows[n % 2 * 64 + n / 2 * 4] = make_float2(x[8 * block + 2 * n], x[8 * block + 2 * n + 1]);
}
// A row of (I + M)^-1 of a block on the diagonal: x (I + M) = a row of I.
__device__ __forceinline__ void gdn_invert_diagonal(const void *from, void *to, int row) {
  const float4 *M = static_cast<const float4 *>(from);
  float x[16];
#pragma unroll
  for (int j = 0; j < 16; ++j) x[j] = row == j;
#pragma unroll
  for (int k = 15; k > 0; --k) {
#pragma unroll
    for (int four = 0; four < (k + 3) / 4; ++four) {
      float4 m = M[k * 4 + four];
      x[4 * four] -= x[k] * m.x;
      if (4 * four + 1 < k) x[4 * four + 1] -= x[k] * m.y;
      if (4 * four + 2 < k) x[4 * four + 2] -= x[k] * m.z;
      if (4 * four + 3 < k) x[4 * four + 3] -= x[k] * m.w;
    }
  }
  uint4 *rows = static_cast<uint4 *>(to) + row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned high[4], low[4];
#pragma unroll
    for (int n = 0; n < 4; ++n)
      gdn_split(x[8 * half + 2 * n], x[8 * half + 2 * n + 1], high[n], low[n]);
    rows[16 * half] = make_uint4(high[0], high[1], high[2], high[3]);
    rows[16 * half + 32] = make_uint4(low[0], low[1], low[2], low[3]);
  }
}
// A lane's 8 numbers of a block, times beta of their columns, to the columns from 16 block on of
// the rows from `first` on of a tile [64][64], which has the swizzle of 128 bytes.
template <class Pair>
__device__ __forceinline__ void gdn_put_block(
    const float *x, const float *beta, void *tile, int first, int block) {
  unsigned word[4];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float2 b = reinterpret_cast<const float2 *>(beta + 16 * block + 8 * n)[threadIdx.x % 4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float *from = x + 4 * n + 2 * m;
      Pair pair = gdn_narrow<Pair>(make_float2(from[0] * b.x, from[1] * b.y));
      word[2 * n + m] = *reinterpret_cast<unsigned *>(&pair);
    }
  }
  int lane = threadIdx.x % 32, row = first + lane % 16, part = 2 * block + lane / 16;
  uint4 *to = static_cast<uint4 *>(tile) + 8 * row + (part ^ row % 8);
  tl::ptx_stmatrix_m8n8_x4(to, word[0], word[1], word[2], word[3]);
}
// A row of blocks of A diag(beta), up to the diagonal.
template <class Pair, int row>
__device__ __forceinline__ void gdn_solve_row(
    const bfloat16_t *below, const bfloat16_t *diagonal, const float *beta, void *tile) {
  GdnBlock left[row + 1];
  left[row].load(diagonal + 512 * row);
  float x[8];
  left[row].get(x);
  gdn_put_block<Pair>(x, beta, tile, 16 * row, row);
#pragma unroll
  for (int j = row - 1; j >= 0; --j) {
    GdnBlock right;
#pragma unroll
    for (int n = 0; n < 8; ++n) x[n] = 0;
#pragma unroll
    for (int k = row; k > j; --k) {
      right.load_right(below + 512 * (k * (k - 1) / 2 + j));
      gdn_multiply_blocks(x, left[k], right);
    }
    left[j].set(x);
    right.load_right(diagonal + 512 * j);
#pragma unroll
    for (int n = 0; n < 8; ++n) x[n] = 0;
    gdn_multiply_blocks(x, left[j], right);
    if (j) left[j].set(x);
    gdn_put_block<Pair>(x, beta, tile, 16 * row, j);
  }
}
template <class Pair>
__device__ __forceinline__ void gdn_solve(
    const void *below, const void *diagonal, const void *beta, void *tile, int row) {
  auto M = static_cast<const bfloat16_t *>(below), X = static_cast<const bfloat16_t *>(diagonal);
  auto b = static_cast<const float *>(beta);
  if (row == 0) gdn_solve_row<Pair, 0>(M, X, b, tile);
  if (row == 1) gdn_solve_row<Pair, 1>(M, X, b, tile);
  if (row == 2) gdn_solve_row<Pair, 2>(M, X, b, tile);
  if (row == 3) gdn_solve_row<Pair, 3>(M, X, b, tile);
}
"""


class BlockInverseSmem:
    """Shared memory of one inverse at a time."""

    def __init__(self) -> None:
        self.below = T.alloc_shared((BELOW * STORED,), "bfloat16")  # -M, below the diagonal
        self.M_diagonal = T.alloc_shared((BLOCKS * BLOCK * BLOCK,), "float32")
        self.A_diagonal = T.alloc_shared((BLOCKS * STORED,), "bfloat16")


@T.macro
def store_M_block(M: Any, inv: Any, block: Any, warp: Any) -> None:
    """Store the column block number `block` of a warp's rows of the fragment M; at most `warp`."""
    if warp == block:
        T.call_extern(
            "handle", "gdn_store_diagonal", M.data,
            T.address_of(inv.M_diagonal[block * BLOCK * BLOCK]), block,
        )  # fmt: skip
    else:
        T.call_extern(
            "handle", "gdn_store_below", M.data,
            T.address_of(inv.below[(warp * (warp - 1) // 2 + block) * STORED]), block,
        )  # fmt: skip


@T.macro
def invert_diagonal_block(inv: Any, block: Any, row: Any) -> None:
    """One row of A_bb, by one thread."""
    T.call_extern(
        "handle", "gdn_invert_diagonal", T.address_of(inv.M_diagonal[block * BLOCK * BLOCK]),
        T.address_of(inv.A_diagonal[block * STORED]), row,
    )  # fmt: skip


@T.macro
def solve_rows(inv: Any, beta: Any, A_v: Any, warp: Any, dtype: str) -> None:
    """A warp's rows of A diag(beta), up to the diagonal block. beta: address of C numbers; A_v: of
    a tile [C, C] of `dtype` with the swizzle of 128 bytes."""
    T.call_extern(
        "handle", f"gdn_solve<{PAIRS[dtype]}>", inv.below.data, inv.A_diagonal.data, beta, A_v, warp
    )
