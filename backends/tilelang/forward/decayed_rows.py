"""Rows of q and k with their decays since the chunk's start or up to its end, for the scan.

    Q_in = scale rq e^G * Q,   K_in = rk e^G * K,   K_out = rk e^{gamma - G} * K    [C, K]

from the factors that `channel_pairs.py` leaves: prefixes e^G and suffixes e^{gamma - G}. In float16
each row is divided by its scale, the largest power of two in it, which `scan` multiplies by.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from ..tile.fragments import PAIRS
from ..tile.layout import KS_FACTOR, QS_FACTOR, U_FACTOR

FACTORS = (QS_FACTOR, KS_FACTOR, U_FACTOR)
"""Where `scan_factors` has the scales of the rows of Q_in, K_in and K_out."""

PRELUDE = """
// Two channels of the thread's token i, of Q_in, K_in or K_out (which = 0, 1, 2).
template <int which, int K, class Pair>
__device__ __forceinline__ float2 gdn_decayed(
    const float *prefix, const float *suffix, const void *x, const void *factors, int i) {
  int row = threadIdx.x / (K / 2) * (K / 8) + i;
  float2 pair = gdn_widen(static_cast<const Pair *>(x)[row * (K / 2) + threadIdx.x % (K / 2)]);
  float factor = static_cast<const float *>(factors)[row];
  const float *f = which == 2 ? suffix : prefix;  // known to the compiler
  return make_float2(pair.x * factor * f[2 * i], pair.y * factor * f[2 * i + 1]);
}
// The largest number of each row, 64 of its channels for each warp: to largest [3][K / 64][64].
template <int which, int K, class Pair>
__device__ __forceinline__ void gdn_find_largest(
    const float *prefix, const float *suffix, const void *x, const void *factors, void *largest) {
  constexpr int tokens = K / 8;
  int warp = threadIdx.x % (K / 2) / 32, first = threadIdx.x / (K / 2) * tokens;
  float *to = static_cast<float *>(largest) + (which * (K / 64) + warp) * 64 + first;
#pragma unroll
  for (int i = 0; i < tokens; ++i) {
    float2 pair = gdn_decayed<which, K, Pair>(prefix, suffix, x, factors, i);
    float larger = fmaxf(fabsf(pair.x), fabsf(pair.y));
    unsigned most = __reduce_max_sync(0xffffffff, __float_as_uint(larger));
    if (threadIdx.x % 32 == 0) to[i] = __uint_as_float(most);
  }
}
// Store Q_in, K_in or K_out to rows [3][64][K] in memory, over the scales of rows if `scaled`, and
// the scales times `sign` to `scales`.
template <int which, int K, class Pair, bool scaled>
__device__ __forceinline__ void gdn_put_decayed_rows(
    const float *prefix, const float *suffix, const void *x, const void *factors,
    const void *largest, void *rows, void *scales, float sign) {
  constexpr int tokens = K / 8;
  int first = threadIdx.x / (K / 2) * tokens, pair = threadIdx.x % (K / 2);
  auto to = static_cast<Pair *>(rows) + (which * 64 + first) * (K / 2) + pair;
  auto most = static_cast<const float *>(largest) + which * K + first;
#pragma unroll
  for (int i = 0; i < tokens; ++i) {
    float2 y = gdn_decayed<which, K, Pair>(prefix, suffix, x, factors, i);
    if (scaled) {
      float scale = K == 64 ? most[i] : fmaxf(most[i], most[64 + i]);
      float over = gdn_reciprocal_power(scale);
      scale = gdn_power_of_two(scale);
      y = make_float2(y.x * over, y.y * over);
      if (pair == 0) static_cast<float *>(scales)[first + i] = sign * scale;
    }
    to[i * (K / 2)] = gdn_narrow<Pair>(y);
  }
  if (!scaled && pair < tokens) static_cast<float *>(scales)[first + pair] = sign;
}
"""


@T.macro
def put_decayed_rows(
    K: int, smem: Any, prefix: Any, suffix: Any, factors: Any, decayed_rows: Any,
    scan_factors: Any, slot: Any, head: Any,
) -> None:  # fmt: skip
    """Store Q_in, K_in and K_out to decayed_rows, in float16 over the scales of rows, and these to
    scan_factors. factors: three addresses of factors of tokens."""
    xs, scaled = (smem.q, smem.k, smem.k), smem.q.dtype == "float16"
    largest = T.address_of(smem.largest[0, 0, 0])
    rows = [T.address_of(decayed_rows[slot, head, 0, 0, 0])]  # a list: not a variable of the kernel
    scales = [T.address_of(scan_factors[slot, head, n, 0]) for n in FACTORS]
    if scaled:
        for n in (0, 1, 2):
            T.call_extern(
                "handle", f"gdn_find_largest<{n}, {K}, {PAIRS[xs[n].dtype]}>", prefix.data,
                suffix.data, T.address_of(xs[n][0, 0, 0]), factors[n], largest,
            )  # fmt: skip
        T.sync_threads()
    for n in (0, 1, 2):
        T.call_extern(
            "handle",
            f"gdn_put_decayed_rows<{n}, {K}, {PAIRS[xs[n].dtype]}, {str(scaled).lower()}>",
            prefix.data, suffix.data, T.address_of(xs[n][0, 0, 0]), factors[n], largest, rows[0],
            scales[n], T.float32(-1 if n == 1 else 1),
        )  # fmt: skip
