"""The sums of squares of rows in shared memory, on the tensor cores.

A warp multiplies 16 rows by themselves with `mma`; the sums are the diagonal of the product. Both
operands have the same layout in registers, so one load serves as both.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

PRELUDE = """
#include <tl_templates/cuda/ldsm.h>
#include <tl_templates/cuda/instruction/mma.h>
// The first half of sums: rows 0 to 7 times rows 0 to 7; the other half: 8 to 15 times 8 to 15.
template <tl::DataType type>
__device__ __forceinline__ void gdn_square(const void *from, float *sums) {
  unsigned x[4];
  tl::ptx_ldmatrix_x4(from, x);
  unsigned upper[2] = {x[0], x[2]}, lower[2] = {x[1], x[3]};
  tl::mma_sync<type, type, tl::DataType::kFloat32, 16, 8, 16, false, true>(sums, x, upper);
  tl::mma_sync<type, type, tl::DataType::kFloat32, 16, 8, 16, false, true>(sums + 4, x, lower);
}
__device__ __forceinline__ void gdn_keep_diagonal(void *into, const float *sums, int lane) {
  int row = lane / 4;
  if (lane % 4 == row / 2) {
    static_cast<float *>(into)[row] = row % 2 ? sums[1] : sums[0];
    static_cast<float *>(into)[row + 8] = row % 2 ? sums[7] : sums[6];
  }
}
"""
TYPES = {"bfloat16": "tl::DataType::kBFloat16", "float16": "tl::DataType::kFloat16"}


@T.macro
def sum_squares(x: Any, first: Any, to: Any, lane: Any) -> None:
    """Store the sums of squares of the rows `first` to `first` + 15 of x[0], from the address `to`
    on; by one warp."""
    sums = T.alloc_local((8,), "float32")
    for i in T.unroll(8):
        sums[i] = 0.0
    for step in T.unroll(x.shape[2] // 16):
        T.call_extern(
            "handle",
            f"gdn_square<{TYPES[x.dtype]}>",
            T.address_of(x[0, first + lane % 16, step * 16 + lane // 16 * 8]),
            sums.data,
        )
    T.call_extern("handle", "gdn_keep_diagonal", to, sums.data, lane)
