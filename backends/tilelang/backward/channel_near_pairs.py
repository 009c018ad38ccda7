"""`channel_gradients.py`: all pairs of a chunk. Those within blocks of 16 tokens take four levels
of `channel_levels.py`, or one step.

Where no channel of a warp falls below 2^-60 over eight tokens, the decay between i and j is D_ij =
f_i g_j for all pairs of a block: f_i is the decay from the middle of the block to i, g_j that from
j to the middle, and the one that goes backwards is a reciprocal. Then

    dq_i += f_i sum_{j < i} X_ij (g_j * k_j),    right_i = f_i sum_{j < i} Y_ij (g_j * k_j)
    dk_j += rest_j right_j + g_j sum_{i > j} (X_ij (f_i * q_i) + Y_ij rest_i (f_i * k_i))

X and Y are zero where i <= j. With a lower bound of -5 no channel falls so low.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from ..tile.fragments import PAIRS
from ..tile.gate_math import always_slow
from .channel_levels import PRELUDE as LEVELS

PRELUDE = (
    LEVELS
    + """
// Whether the decays e^g of eight tokens, which four lanes have, are 2^-60 or more in all of the
// warp's channels.
__device__ __forceinline__ bool gdn_decays_slowly(const float *decays) {
  unsigned fast = 0;
#pragma unroll
  for (int n = 0; n < 32; n += 2) {
    float total = decays[n] * decays[n + 1];
    total *= __shfl_xor_sync(0xffffffff, total, 1);
    total *= __shfl_xor_sync(0xffffffff, total, 2);
    fast |= !(total >= 0x1p-60f);
  }
  return __reduce_max_sync(0xffffffff, fast) == 0;
}
// f and g of word w of the blocks b and b + 1 (word 2 n + c, block n).
__device__ __forceinline__ void gdn_near_factors(
    const GdnLevel &s, int b, int w, float2 &f, float2 &g) {
  const float *factor = (w / 2 ? s.prefix : s.suffix) + 4 * b + 2 * w;
  float2 one = make_float2(factor[0], factor[1]);
  float2 other = make_float2(1 / factor[0], 1 / factor[1]);
  f = w / 2 ? one : other, g = w / 2 ? other : one;
}
// What an operand holds of x.
template <int parts> __device__ __forceinline__ float2 gdn_held(unsigned word, float2 x) {
  return parts == 1 ? gdn_widen(*reinterpret_cast<__nv_bfloat162 *>(&word)) : x;
}
// The pairs within blocks of 16 tokens, from factors of blocks of 8.
template <int parts, class Pair> __device__ __forceinline__ void gdn_near_pairs(GdnLevel s) {
  s.terms += gdn_opaque(0);  // else the terms stay in registers
  int tile = threadIdx.x % 32 / 8;
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    float2 q[4], k[4];
    gdn_entries<Pair>(s.q, b, q), gdn_entries<Pair>(s.k, b, k);
    unsigned q_f[2][4], k_f[2][4], k_g[2][4];  // f * q, f * k times rest, and g * k
    float2 f, g;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float2 rest = s.rest_of(b + w / 2);
      gdn_near_factors(s, b, w, f, g);
      gdn_operand<parts>(make_float2(q[w].x * f.x, q[w].y * f.y), &q_f[0][w], 4);
      gdn_operand<parts>(
          make_float2(k[w].x * f.x * rest.x, k[w].y * f.y * rest.y), &k_f[0][w], 4);
      gdn_operand<parts>(make_float2(k[w].x * g.x, k[w].y * g.y), &k_g[0][w], 4);
    }
    const void *matrix = tile % 2 ? s.Y : s.X;
    // X and Y of block row b, and of block row b + 1; then of the second block of the latter
    unsigned first[2][4], second[2][4], first_t[2][4], second_t[2][4];
    gdn_load_blocks<parts, false>(matrix, b + tile / 2, b, first);
    gdn_load_blocks<parts, true>(matrix, b + tile / 2, b, first_t);
    gdn_load_blocks<parts, false>(matrix, b + 1, b + 1, second);
    gdn_load_blocks<parts, true>(matrix, b + 1, b + 1, second_t);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float dq[4] = {}, right[4] = {}, out[4] = {};
      unsigned a[2][4], x[2][2], y[2][2];
#pragma unroll
      for (int p = 0; p < parts; ++p) {  // tokens of block n, times those before them
        x[p][0] = first[p][2 * n], x[p][1] = n ? second[p][0] : 0;
        y[p][0] = first[p][2 * n + 1], y[p][1] = n ? second[p][1] : 0;
      }
      gdn_add_product<parts>(dq, k_g, x);
      gdn_add_product<parts>(right, k_g, y);
#pragma unroll
      for (int p = 0; p < parts; ++p) {  // and those after them
        x[p][0] = n ? second_t[p][0] : first_t[p][0], x[p][1] = n ? second_t[p][1] : first_t[p][2];
        y[p][0] = first_t[p][1], y[p][1] = first_t[p][3];
        a[p][0] = q_f[p][2 * n], a[p][1] = q_f[p][2 * n + 1];
        a[p][2] = n ? k_f[p][2] : q_f[p][2], a[p][3] = n ? k_f[p][3] : q_f[p][3];
      }
      gdn_add_product<parts>(out, a, x);
      if (n == 0) gdn_add_product<parts>(out, k_f, y);
      float2 rest = s.rest_of(b + n);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int w = 2 * n + c, at = 4 * b + 2 * w;
        gdn_near_factors(s, b, w, f, g);
        float2 q_held = gdn_held<parts>(q_f[0][w], make_float2(q[w].x * f.x, q[w].y * f.y));
        float2 k_held = gdn_held<parts>(
            k_f[0][w], make_float2(k[w].x * f.x * rest.x, k[w].y * f.y * rest.y));
        float2 left = gdn_held<parts>(k_g[0][w], make_float2(k[w].x * g.x, k[w].y * g.y));
        s.dq[at] += f.x * dq[2 * c], s.dq[at + 1] += f.y * dq[2 * c + 1];
        s.dk[at] += rest.x * f.x * right[2 * c] + g.x * out[2 * c];
        s.dk[at + 1] += rest.y * f.y * right[2 * c + 1] + g.y * out[2 * c + 1];
        float2 term = s.terms[at / 2 * gdn_threads];
        term.x += q_held.x * dq[2 * c] + k_held.x * right[2 * c] - left.x * out[2 * c];
        term.y += q_held.y * dq[2 * c + 1] + k_held.y * right[2 * c + 1] - left.y * out[2 * c + 1];
        s.terms[at / 2 * gdn_threads] = term;
        s.rights[2 * (b + n)] += k[w].x * f.x * right[2 * c];
        s.rights[2 * (b + n) + 1] += k[w].y * f.y * right[2 * c + 1];
      }
    }
  }
}
// All pairs. On entry `prefix` has e^g. X, Y: [parts][64][64] bfloat16; rest: [64].
template <int parts, class Pair, bool always_slow>
__device__ __forceinline__ void gdn_all_pairs(
    float *prefix, float *suffix, float *dq, float *dk, void *terms, float *rights,
    const void *q, const void *k, const void *X, const void *Y, const void *rest) {
  GdnLevel s{prefix, suffix, dq, dk, rights, static_cast<float2 *>(terms), q, k, X, Y,
             static_cast<const float *>(rest)};
  // two parts and both ways would spill twice as much
  if (always_slow || parts == 1 && gdn_decays_slowly(prefix)) {
    gdn_join<1>(prefix, suffix), gdn_join<2>(prefix, suffix), gdn_join<4>(prefix, suffix);
    gdn_near_pairs<parts, Pair>(s);
  } else {
    gdn_narrow_level<1, parts, Pair>(s);
    gdn_join<1>(prefix, suffix);
    gdn_narrow_level<2, parts, Pair>(s);
    gdn_join<2>(prefix, suffix);
    gdn_narrow_level<4, parts, Pair>(s);
    gdn_join<4>(prefix, suffix);
    gdn_narrow_level<8, parts, Pair>(s);
  }
  gdn_join<8>(prefix, suffix);
  gdn_wide_level<16, parts, Pair>(s);
  gdn_join<16>(prefix, suffix);
  gdn_wide_level<32, parts, Pair>(s);
}
"""
)


@T.macro
def add_pairs(smem: Any, regs: Any, parts: int, thread: Any, lower_bound: float | None) -> None:
    """Add all pairs to regs.dq, dk and rights, and to the terms in smem.aside, from e^g in
    regs.prefix and ones in regs.suffix. lower_bound: of the gates, or None."""
    kind = f"{parts}, {PAIRS[smem.q.dtype]}, {str(always_slow(lower_bound)).lower()}"
    T.call_extern(
        "handle", f"gdn_all_pairs<{kind}>", regs.prefix.data, regs.suffix.data, regs.dq.data,
        regs.dk.data, T.address_of(smem.aside[0, thread, 0]), regs.rights.data,
        T.address_of(smem.q[0, 0, 0]), T.address_of(smem.k[0, 0, 0]),
        T.address_of(smem.XY[0, 0, 0]), T.address_of(smem.XY[parts, 0, 0]),
        T.address_of(smem.rest[0]),
    )  # fmt: skip
