"""Sums over the rows and columns of a float32 fragment [C, N], and products with a stored one.

A fragment is distributed over a warpgroup as WGMMA leaves its result: a thread has two rows, eight
apart, and two neighbouring columns of every eight. TileLang's reductions would go through shared
memory; these are CUDA templates, in which every index is known, so that no array is put into local
memory.
"""

from typing import Any

import tilelang.language as T

PRELUDE = """
template <int N> __device__ __forceinline__ void gdn_sum_rows(const float *x, void *into) {
  float *to = static_cast<float *>(into);
  float upper = 0.f, lower = 0.f;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    upper += x[4 * n] + x[4 * n + 1];
    lower += x[4 * n + 2] + x[4 * n + 3];
  }
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    upper += __shfl_xor_sync(0xffffffff, upper, lanes);
    lower += __shfl_xor_sync(0xffffffff, lower, lanes);
  }
  if (threadIdx.x % 4 == 0) {
    to[threadIdx.x / 4 % 8] = upper;
    to[threadIdx.x / 4 % 8 + 8] = lower;
  }
}
// Lanes with the same columns halve their sums: each sends one half and keeps the other.
template <int HALF, int LANES>
__device__ __forceinline__ void gdn_halve(float *sums, int &first) {
  bool upper = threadIdx.x & LANES;
#pragma unroll
  for (int n = 0; n < HALF; ++n) {
    float send = upper ? sums[n] : sums[n + HALF], keep = upper ? sums[n + HALF] : sums[n];
    sums[n] = keep + __shfl_xor_sync(0xffffffff, send, LANES);
  }
  first += upper ? HALF * 4 : 0;
}
template <int N> __device__ __forceinline__ void gdn_add_rows(const float *x, float *sums) {
#pragma unroll
  for (int n = 0; n < N / 4; ++n) sums[n] = x[n / 2 * 4 + n % 2] + x[n / 2 * 4 + n % 2 + 2];
}
template <int N> __device__ __forceinline__ void gdn_sum_columns(const float *x, void *into) {
  float sums[N / 4];
  gdn_add_rows<N>(x, sums);
  int first = threadIdx.x % 4 * 2;
  gdn_halve<N / 8, 4>(sums, first);
  gdn_halve<N / 16, 8>(sums, first);
  gdn_halve<N / 32, 16>(sums, first);
#pragma unroll
  for (int n = 0; n < N / 32; ++n) static_cast<float *>(into)[first + n] = sums[n];
}
template <int N> __device__ __forceinline__ void gdn_put_row(const float *x, void *into) {
  float sums[N / 4];
  gdn_add_rows<N>(x, sums);
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
    static_cast<float2 *>(into)[4 * n] = make_float2(sums[2 * n], sums[2 * n + 1]);
}
template <class T> struct alignas(4 * sizeof(T)) GdnFour { T x[4]; };
template <class T, int N>
__device__ __forceinline__ void gdn_put_aside(const float *x, void *into) {
  GdnFour<T> *to = static_cast<GdnFour<T> *>(into) + threadIdx.x % 128;
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
    to[128 * n] = {T(x[4 * n]), T(x[4 * n + 1]), T(x[4 * n + 2]), T(x[4 * n + 3])};
}
template <class T, int N>
__device__ __forceinline__ void gdn_multiply(float *x, const void *by) {
  const GdnFour<T> *from = static_cast<const GdnFour<T> *>(by) + threadIdx.x % 128;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    GdnFour<T> y = from[128 * n];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[4 * n + i] *= float(y.x[i]);
  }
}
"""

C_TYPES = {"bfloat16": "bfloat16_t", "float16": "half_t"}


@T.macro
def put_aside(x: Any, to: Any, dtype: str) -> None:
    """Store the fragment x in dtype, a thread's numbers side by side in fours. to: address of as
    much shared memory."""
    T.call_extern("handle", f"gdn_put_aside<{C_TYPES[dtype]}, {x.shape[1]}>", x.data, to)


@T.macro
def multiply(x: Any, stored: Any, dtype: str) -> None:
    """x *= the fragment that `put_aside` stored there."""
    T.call_extern("handle", f"gdn_multiply<{C_TYPES[dtype]}, {x.shape[1]}>", x.data, stored)


@T.macro
def sum_rows(x: Any, to: Any) -> None:
    """Store the sums over the columns of x, one for each of the 16 rows of a warp. to: address of
    the first."""
    T.call_extern("handle", f"gdn_sum_rows<{x.shape[1]}>", x.data, to)


@T.macro
def sum_columns(x: Any, to: Any) -> None:
    """Store the sums over the 16 rows of a warp, one for each column of x. to: address of the
    first."""
    T.call_extern("handle", f"gdn_sum_columns<{x.shape[1]}>", x.data, to)


@T.macro
def put_row(x: Any, to: Any) -> None:
    """Store the sum of a thread's two rows, for each of its columns of x. to: address of the
    thread's first column in a row of N numbers."""
    T.call_extern("handle", f"gdn_put_row<{x.shape[1]}>", x.data, to)
