"""Copies between fragments in registers and tiles in shared memory, as they are or transposed.

A fragment [64, C] is distributed over a warpgroup as WGMMA takes its left operand and leaves its
result. Its transpose in shared memory is a tile [C, 64], a row a token. Four instructions a warp
(`ldmatrix`, `stmatrix`) move a fragment either way.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

PAIRS = {"bfloat16": "__nv_bfloat162", "float16": "half2"}
"""CUDA's types of two numbers."""
PRELUDE = """
#include <tl_templates/cuda/ldsm.h>
// x, so that nothing computed from it stays in registers from one use to the next.
template <class T> __device__ __forceinline__ T gdn_opaque(T x) {
  asm volatile("" : "+r"(x));
  return x;
}
// The number of a thread in a warpgroup, in a register. Where registers are short, ptxas reads
// threadIdx again for every use, and each time waits for it. It does not repeat a shuffle.
__device__ __forceinline__ int gdn_kept_thread() {
  return __shfl_sync(0xffffffff, threadIdx.x, threadIdx.x % 32) % 128;
}
// Two numbers in float32 to and from a type of `PAIRS`.
template <class Pair> __device__ __forceinline__ Pair gdn_narrow(float2 x);
template <> __device__ __forceinline__ __nv_bfloat162 gdn_narrow<__nv_bfloat162>(float2 x) {
  return __float22bfloat162_rn(x);
}
template <> __device__ __forceinline__ half2 gdn_narrow<half2>(float2 x) {
  return __float22half2_rn(x);
}
__device__ __forceinline__ float2 gdn_widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 gdn_widen(half2 x) { return __half22float2(x); }
// Each moves the 16 columns number `pair` of a fragment: from or to 16 rows of shared memory
// (transposed), or from or to 16 columns (`gdn_load`, `gdn_store`).
__device__ __forceinline__ void gdn_load_transposed(const void *from, void *to, int pair) {
  tl::ptx_ldmatrix_x4_trans(from, reinterpret_cast<int *>(to) + 4 * pair);
}
__device__ __forceinline__ void gdn_load(const void *from, void *to, int pair) {
  tl::ptx_ldmatrix_x4(from, reinterpret_cast<int *>(to) + 4 * pair);
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
"""CUDA that goes before a kernel. TileLang's own copies would move 2 bytes at a time."""


@T.macro
def load_transposed(rows: Any, s: Any, fragment: Any, thread: Any) -> None:
    """fragment [64, C] = rows[s]^T, where rows[s] is [C, 64] in shared memory. thread: its number
    in the warpgroup."""
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
    """rows[s][:, first : first + 64] = fragment^T: the inverse of `load_transposed`."""
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
    """tile[s] = fragment, both [64, N]; the tile is in shared memory."""
    warp, lane = thread // 32, thread % 32
    for pair in T.unroll(fragment.shape[1] // 16):
        T.call_extern(
            "handle",
            "gdn_store",
            T.address_of(tile[s, warp * 16 + lane % 16, pair * 16 + lane // 16 * 8]),
            fragment.data,
            pair,
        )


@T.macro
def load(tile: Any, s: Any, fragment: Any, thread: Any) -> None:
    """fragment = tile[s], both [64, N]: the inverse of `store`."""
    warp, lane = thread // 32, thread % 32
    for pair in T.unroll(fragment.shape[1] // 16):
        T.call_extern(
            "handle",
            "gdn_load",
            T.address_of(tile[s, warp * 16 + lane % 16, pair * 16 + lane // 16 * 8]),
            fragment.data,
            pair,
        )
