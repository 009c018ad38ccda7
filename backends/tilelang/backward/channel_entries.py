"""Tiles of a chunk in the registers of `channel_gradients.py`: entries, operands of `mma`, factors.

Everything is transposed: a warp has 16 channels of all tokens, in the layout that `mma` leaves a
result [16, 64] in. Entry n = 4 b + 2 c + e of a thread is the token 8 b + 2 (lane % 4) + e and the
channel 16 warp + lane / 4 + 8 c. Two blocks of 8 tokens are then the left operand of `mma` as they
are.

Factors are those of `forward/channel_pairs.py`: from products of e^g over blocks of h tokens follow
those over 2 h. That needs a shuffle a pair of entries at most, and no shared memory.

Operands are bfloat16; in float16 calls of two parts, x = high + low. Addresses go through
`gdn_opaque`: else the compiler keeps what it has loaded, and spills other registers for it.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

PRELUDE = """
#include <tl_templates/cuda/instruction/mma.h>
// Entries of a tile of q or k, [K / 64][64][64], for the blocks b and b + 1: a word is a pair.
__device__ __forceinline__ const uint4 *gdn_rows_of(const void *tile, int b) {
  int lane = gdn_opaque(threadIdx.x % 32), row = 8 * b + lane / 16 * 8 + lane % 8;
  int unit = threadIdx.x / 32 * 2 + lane / 8 % 2;
  return static_cast<const uint4 *>(tile) + (64 * threadIdx.y + row) * 8 + (unit ^ row % 8);
}
template <class Pair>
__device__ __forceinline__ void gdn_entries(const void *tile, int b, float2 *to) {
  unsigned words[4];
  tl::ptx_ldmatrix_x4_trans(gdn_rows_of(tile, b), words);
#pragma unroll
  for (int n = 0; n < 4; ++n) to[n] = gdn_widen(*reinterpret_cast<Pair *>(&words[n]));
}
// A pair as `parts` words, `stride` apart. Returns what they hold; two parts hold nearly all.
template <int parts>
__device__ __forceinline__ float2 gdn_operand(float2 x, unsigned *to, int stride) {
  auto high = gdn_narrow<__nv_bfloat162>(x);
  float2 kept = gdn_widen(high);
  to[0] = *reinterpret_cast<unsigned *>(&high);
  if (parts == 1) return kept;
  auto low = gdn_narrow<__nv_bfloat162>(make_float2(x.x - kept.x, x.y - kept.y));
  to[stride] = *reinterpret_cast<unsigned *>(&low);
  return x;
}
template <int parts>
__device__ __forceinline__ void gdn_add_product(
    float *sum, unsigned (*a)[4], unsigned (*b)[2]) {
  constexpr auto type = tl::DataType::kBFloat16;
#pragma unroll
  for (int p = 2 * parts - 2; p >= 0; --p)  // low high and high low before high high
    tl::mma_sync<type, type, tl::DataType::kFloat32, 16, 8, 16, false, true>(
        sum, a[p / 2], b[p % 2]);
}
// Words of four tiles [8][8] of X or Y: block rows and columns of this lane's tile.
template <int parts, bool transposed>
__device__ __forceinline__ void gdn_load_blocks(
    const void *matrix, int block_row, int block_column, unsigned (*to)[4]) {
  int row = 8 * block_row + gdn_opaque(threadIdx.x % 8);
#pragma unroll
  for (int p = 0; p < parts; ++p) {
    auto from = static_cast<const uint4 *>(matrix) + 512 * p + 8 * row + (block_column ^ row % 8);
    if (transposed)
      tl::ptx_ldmatrix_x4_trans(from, to[p]);
    else
      tl::ptx_ldmatrix_x4(from, to[p]);
  }
}
// From factors of blocks of h tokens to those of blocks of 2 h.
template <int h> __device__ __forceinline__ void gdn_join(float *prefix, float *suffix) {
  int lane = threadIdx.x % 32;
  if (h == 1) {
#pragma unroll
    for (int n = 0; n < 32; n += 2) {
      float left = prefix[n];
      suffix[n] *= prefix[n + 1];
      prefix[n + 1] *= left;
    }
  } else if (h < 8) {
    bool right = lane & h / 2;
    int other = (lane ^ h / 2) | (h / 2 - 1);
#pragma unroll
    for (int n = 0; n < 32; n += 2) {
      float total = __shfl_sync(0xffffffff, prefix[n + 1], other);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        prefix[n + e] *= right ? total : 1;
        suffix[n + e] *= right ? 1 : total;
      }
    }
  } else {
    constexpr int blocks = h < 8 ? 1 : h / 8;
#pragma unroll
    for (int first = 0; first < 8; first += 2 * blocks)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int last = 4 * (first + blocks - 1) + 2 * c + 1;
        float left = __shfl_sync(0xffffffff, prefix[last], lane | 3);
        float right = __shfl_sync(0xffffffff, prefix[last + 4 * blocks], lane | 3);
#pragma unroll
        for (int n = 0; n < blocks; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            suffix[4 * (first + n) + 2 * c + e] *= right;
            prefix[4 * (first + blocks + n) + 2 * c + e] *= left;
          }
      }
  }
}
// Factors of the whole chunk from e^g.
__device__ __forceinline__ void gdn_join_all(float *prefix, float *suffix) {
  gdn_join<1>(prefix, suffix), gdn_join<2>(prefix, suffix), gdn_join<4>(prefix, suffix);
  gdn_join<8>(prefix, suffix), gdn_join<16>(prefix, suffix), gdn_join<32>(prefix, suffix);
}
"""


@T.macro
def join_all(regs: Any) -> None:
    """Factors of the whole chunk, from e^g in regs.prefix and ones in regs.suffix."""
    T.call_extern("handle", "gdn_join_all", regs.prefix.data, regs.suffix.data)
