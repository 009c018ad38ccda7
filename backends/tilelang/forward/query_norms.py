"""The sums of squares of a chunk's rows of q, by one warp of `fused.py`, without tensor cores: a
product of one warp waits there for the many of the consumer warpgroups."""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from ..tile.fragments import PAIRS

PRELUDE = """
// Of a tile [64][64 panels] in shared memory: a panel has 128 bytes a row, in any order. Eight
// lanes read a row of a panel. Then they exchange sums, so that each has the sum of one row.
template <int panels, class Pair>
__device__ __forceinline__ void gdn_sum_squares(const void *tile, void *to) {
  int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const uint4 *from = static_cast<const uint4 *>(tile) + 256 * half + lane;
    float sums[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      sums[n] = 0;
#pragma unroll
      for (int p = 0; p < panels; ++p) {
        uint4 x = from[512 * p + 32 * n];
        unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          float2 pair = gdn_widen(*reinterpret_cast<Pair *>(words + m));
          sums[n] += pair.x * pair.x, sums[n] += pair.y * pair.y;
        }
      }
    }
#pragma unroll
    for (int width = 4; width; width /= 2)
#pragma unroll
      for (int n = 0; n < width; ++n) {
        float keep = lane & width ? sums[n + width] : sums[n];
        float send = lane & width ? sums[n] : sums[n + width];
        sums[n] = keep + __shfl_xor_sync(0xffffffff, send, width);
      }
    static_cast<float *>(to)[32 * half + lane % 8 * 4 + lane / 8] = sums[0];
  }
}
"""


@T.macro
def sum_squares(q: Any, s: Any, to: Any) -> None:
    """Store the sums of squares of the rows of q[s] from the address `to` on."""
    T.call_extern(
        "handle", f"gdn_sum_squares<{q.shape[2] // 64}, {PAIRS[q.dtype]}>",
        T.address_of(q[s, 0, 0]), to,
    )  # fmt: skip
