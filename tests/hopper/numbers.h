// CUDA's words and numbers, for a C++ compiler.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <ucontext.h>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __restrict__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

typedef unsigned char uchar;
typedef unsigned int uint;
struct uint1 { uint x; };
struct uint2 { uint x, y; };
struct uint4 { uint x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint1 make_uint1(uint x) { return {x}; }
inline uint2 make_uint2(uint x, uint y) { return {x, y}; }
inline uint4 make_uint4(uint x, uint y, uint z, uint w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From> To bits(From from) {
  To to{};
  static_assert(sizeof to == sizeof from);
  memcpy(&to, &from, sizeof to);
  return to;
}
struct bfloat16_t {
  uint16_t b;
  bfloat16_t() = default;
  bfloat16_t(float x) {
    uint32_t u = bits<uint32_t>(x);
    b = std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const { return bits<float>(uint32_t(b) << 16); }
};
struct half_t {
  _Float16 b;
  half_t() = default;
  half_t(float x) : b(x) {}
  operator float() const { return float(b); }
};
template <class T> struct Pair { T x, y; };
typedef Pair<bfloat16_t> __nv_bfloat162;
typedef __nv_bfloat162 nv_bfloat162;
typedef Pair<half_t> half2;
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float2 __half22float2(half2 v) { return {v.x, v.y}; }
inline uint __pack_nv_bfloat162(bfloat16_t x, bfloat16_t y) { return bits<uint>(__nv_bfloat162{x, y}); }
template <class T> uint __pack_half2(T x, T y) { return bits<uint>(Pair<T>{x, y}); } // also of bfloat16
#define CUDART_INF_F INFINITY
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
template <class A, class B> auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> auto max(A a, B b) { return a < b ? b : a; }
