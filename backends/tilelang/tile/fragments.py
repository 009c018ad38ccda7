"""Tiles that cross between rows of tokens in shared memory and, mostly transposed, registers.

A fragment [64, C] of a warpgroup, as WGMMA takes its left operand and leaves its result, is the
transpose of C rows of 64 columns. Eight instructions a warp move it either way.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

PRELUDE = """
#include <tl_templates/cuda/ldsm.h>
// 16 columns, number `pair`, of a fragment, from or to 16 rows of shared memory; `gdn_store` leaves
// them columns
__device__ __forceinline__ void gdn_load_transposed(const void *from, void *to, int pair) {
  tl::ptx_ldmatrix_x4_trans(from, reinterpret_cast<int *>(to) + 4 * pair);
}
__device__ __forceinline__ void gdn_store(void *to, const void *from, int pair) {
  const int *x = reinterpret_cast<const int *>(from) + 4 * pair;
  tl::ptx_stmatrix_m8n8_x4(to, x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void gdn_store_transposed(void *to, const void *from, int pair) {
  const int *x = reinterpret_cast<const int *>(from) + 4 * pair;
  tl::ptx_stmatrix_m8n8_x4_trans(to, x[0], x[1], x[2], x[3]);
}
"""
"""CUDA that goes before a kernel: what TileLang would load and store two bytes at a time."""


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
def store_transposed(fragment: Any, rows: Any, s: Any, thread: Any, first: Any) -> None:
    """The inverse of `load_transposed`, to the 64 columns of rows[s] from `first` on."""
    warp, lane = thread // 32, thread % 32
    for pair in T.unroll(C // 16):
        T.call_extern(
            "handle",
            "gdn_store_transposed",
            T.address_of(
                rows[
                    s, pair * 16 + lane // 16 * 8 + lane % 8, first + warp * 16 + lane // 8 % 2 * 8
                ]
            ),
            fragment.data,
            pair,
        )


@T.macro
def store(fragment: Any, tile: Any, s: Any, thread: Any) -> None:
    """A fragment [64, N] to tile[s], [64, N] in shared memory, as it is."""
    warp, lane = thread // 32, thread % 32
    for pair in T.unroll(fragment.shape[1] // 16):
        T.call_extern(
            "handle",
            "gdn_store",
            T.address_of(tile[s, warp * 16 + lane % 16, pair * 16 + lane // 16 * 8]),
            fragment.data,
            pair,
        )
