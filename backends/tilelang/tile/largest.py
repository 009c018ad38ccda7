"""The largest of a chunk's numbers, and powers of two."""

from __future__ import annotations

from typing import Any

import tilelang.language as T

PRELUDE = """
// The largest of the first `live` of 64 numbers, without their signs; for all lanes of a warp.
__device__ __forceinline__ float gdn_largest(const void *x, int live = 64) {
  int first = threadIdx.x % 32 * 2;
  float2 pair = static_cast<const float2 *>(x)[first / 2];
  float larger = fmaxf(first < live ? fabsf(pair.x) : 0, first + 1 < live ? fabsf(pair.y) : 0);
  return __uint_as_float(__reduce_max_sync(0xffffffff, __float_as_uint(larger)));
}
// The largest power of two that is at most x > 0, and its reciprocal.
__device__ __forceinline__ float gdn_power_of_two(float x) {
  return __uint_as_float(__float_as_uint(x) & 0x7f800000);
}
__device__ __forceinline__ float gdn_reciprocal_power(float x) {
  return __uint_as_float(0x7f000000 - (__float_as_uint(x) & 0x7f800000));
}
"""


def largest(x: Any, *live: Any) -> Any:
    """The largest of C numbers (or the first `live` of them) from the address x on, without their
    signs; by whole warps."""
    return T.call_extern("float32", "gdn_largest", x, *live)


def power_of_two(x: Any) -> Any:
    """The largest power of two that is at most x, a positive float32."""
    return T.call_extern("float32", "gdn_power_of_two", x)


def reciprocal_power(x: Any) -> Any:
    """1 / `power_of_two`, exactly, for x below 2^127."""
    return T.call_extern("float32", "gdn_reciprocal_power", x)
