"""Blocks of 16 x 16 numbers, in the registers of a warp and in shared memory, and their products.

The products are those of the tensor cores (`mma`), with float16 operands, or with operands of two
parts: x = high + low, both bfloat16. Then a product is three: high high + high low + low high. That
keeps 16 bits of the mantissa and the range of float32.

A stored block is 512 bytes a part: four tiles of 8 x 8, left ones first, in which a row follows the
other. So lane n of a warp reads and writes from byte 16 n on.
"""

BLOCK = 16

PRELUDE = """
#include <tl_templates/cuda/ldsm.h>
#include <tl_templates/cuda/instruction/mma.h>
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
  __device__ __forceinline__ void load(const uint4 *from, unsigned lane) {
#pragma unroll
    for (int p = 0; p < parts; ++p) tl::ptx_ldmatrix_x4(from + 32 * p + lane, x[p]);
  }
  __device__ __forceinline__ void load_right(const uint4 *from, unsigned lane) {
#pragma unroll
    for (int p = 0; p < parts; ++p) tl::ptx_ldmatrix_x4_trans(from + 32 * p + lane, x[p]);
  }
  __device__ __forceinline__ void store(uint4 *to, unsigned lane) const {
#pragma unroll
    for (int p = 0; p < parts; ++p)
      tl::ptx_stmatrix_m8n8_x4(to + 32 * p + lane, x[p][0], x[p][1], x[p][2], x[p][3]);
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
"""
"""CUDA that goes before a kernel."""
