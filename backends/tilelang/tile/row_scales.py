"""Powers of two that keep the rows of a state within float16's range, which ends at 65504.

A scan in float16 holds S^T over a power of two for each row, its scale. The scale is 1 while all
elements of the row are below 2^11, else the largest is between 2^10 and 2^11: then the products of
the row with normalised keys, and what they add to the row, fit too. A row of S^T is a column of V,
and columns of V never meet in the equations of a scan. So V is divided by the scales, O is
multiplied by them, and nothing else changes. bfloat16 has the range of float32 and no scales.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

PRELUDE = """
// x, a warp's 16 rows of a fragment [64, N] over their scales: bring it to new scales. A lane has
// two rows. `before` gets the scales so far.
template <int N>
__device__ __forceinline__ void gdn_rescale(
    float *x, float *scales, float *reciprocals, float *before) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = 0;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) largest = fmaxf(largest, fabsf(x[4 * n + 2 * row + e]));
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, lanes));
    before[row] = scales[row];
    // float32 stores the exponent of 1 as 127
    int exponent = int(__float_as_uint(largest * scales[row]) >> 23) - 10;
    exponent = exponent < 127 ? 127 : exponent;
    scales[row] = __uint_as_float(exponent << 23);
    reciprocals[row] = __uint_as_float((254 - exponent) << 23);
    float change = before[row] * reciprocals[row];
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) x[4 * n + 2 * row + e] *= change;
  }
}
template <int N>
__device__ __forceinline__ void gdn_multiply_rows(float *x, const float *factors) {
#pragma unroll
  for (int n = 0; n < N / 2; ++n) x[n] *= factors[n / 2 % 2];
}
"""


class RowScales:
    """Registers: the scales of a lane's two rows of a fragment [64, N], their reciprocals, and the
    scales before the last `rescale`."""

    def __init__(self) -> None:
        self.scales, self.reciprocals, self.before = (
            T.alloc_local((2,), "float32") for _ in range(3)
        )


@T.macro
def begin_scales(rows: Any) -> None:
    """Set all scales to 1."""
    for i in T.unroll(2):
        rows.scales[i] = 1.0


@T.macro
def rescale(rows: Any, x: Any) -> None:
    """Bring x, a float32 fragment [64, N] over its scales, to new scales."""
    T.call_extern(
        "handle", f"gdn_rescale<{x.shape[1]}>", x.data, rows.scales.data, rows.reciprocals.data,
        rows.before.data,
    )  # fmt: skip


@T.macro
def multiply_rows(x: Any, factors: Any) -> None:
    """Multiply the rows of a float32 fragment [64, N] by one of `RowScales`."""
    T.call_extern("handle", f"gdn_multiply_rows<{x.shape[1]}>", x.data, factors.data)


@T.macro
def store_scales(rows: Any, to: Any, slot: Any, head: Any, block: Any, thread: Any) -> None:
    """Store the scales to to[slot, head, block], which has 64 numbers."""
    if thread % 4 == 0:
        for i in T.unroll(2):
            to[slot, head, block, thread // 32 * 16 + thread // 4 % 8 + 8 * i] = rows.scales[i]
