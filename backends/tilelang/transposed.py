"""Tiles that cross between rows of tokens in shared memory and transposed ones in registers.

A fragment [64, C] of a warpgroup, as WGMMA takes its left operand and leaves its result, is the
transpose of C rows of 64 columns. Eight instructions a warp move it either way.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

PRELUDE = """
#include <tl_templates/cuda/ldsm.h>
// 16 rows of shared memory to or from 16 columns, number `pair`, of a transposed fragment
__device__ __forceinline__ void gdn_load_transposed(const void *from, void *to, int pair) {
  tl::ptx_ldmatrix_x4_trans(from, reinterpret_cast<int *>(to) + 4 * pair);
}
__device__ __forceinline__ void gdn_store_transposed(void *to, const void *from, int pair) {
  const int *x = reinterpret_cast<const int *>(from) + 4 * pair;
  tl::ptx_stmatrix_m8n8_x4_trans(to, x[0], x[1], x[2], x[3]);
}
"""


@T.macro
def load_transposed(rows: Any, s: Any, fragment: Any, thread: Any) -> None:
    """fragment [64, C] = rows[s]^T, rows[s] [C, 64] in shared memory; thread counts in the
    warpgroup."""
    warp, lane = thread // 32, thread % 32
    for pair in T.unroll(C // 16):
        T.call_extern(
            "handle",
            "gdn_load_transposed",
            T.address_of(
                rows[s, pair * 16 + lane // 16 * 8 + lane % 8, warp * 16 + lane // 8 % 2 * 8]
            ),
            fragment.data,
            pair,
        )


@T.macro
def store_transposed(fragment: Any, rows: Any, s: Any, thread: Any) -> None:
    """The inverse of `load_transposed`."""
    warp, lane = thread // 32, thread % 32
    for pair in T.unroll(C // 16):
        T.call_extern(
            "handle",
            "gdn_store_transposed",
            T.address_of(
                rows[s, pair * 16 + lane // 16 * 8 + lane % 8, warp * 16 + lane // 8 % 2 * 8]
            ),
            fragment.data,
            pair,
        )
