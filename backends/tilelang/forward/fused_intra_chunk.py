"""The intra-chunk work of `fused.py`: what `block_merges.py` makes A_v of, and P.

`intra_chunk.py` has the equations. In the intra-chunk warpgroup a warp has 16 rows of k k^T, and
makes M of the blocks of 16 columns that are not above the diagonal. Let R_b be G at the last token
of block b. In the block of rows a and columns b < a

    e^{G_i - G_j} = e^{G_i - R_(a-1)} e^{R_(a-1) - R_b} e^{R_b - G_j}

needs one exponential, since the first and the last factor are a token's own. None exceeds 1. A
consumer warpgroup has half of the columns of k q^T, the transpose of P.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.definition import L2_EPS

from ..tile.fragments import PAIRS

SUM, EXPONENT, FROM, TO_M, SQUARES, M_FACTOR, P_FACTOR, STRENGTH = range(8)
"""Rows of `tokens` [stages, 8, C], of each token: G; G - log2 rk; e^{R_b - G} rk;
e^{G - R_(a-1)} times the factor of M; the sum of squares of q, for the gate warp; the factors of
M and P, -beta rk and scale rq; beta. The gate warp knows no rk: the intra-chunk warpgroup
multiplies it in, since k k^T has the norms of k."""

PRELUDE = """
// What a lane has of 16 columns of a fragment [64, 64]: x[4 n + 2 m + e] is in row 8 m + lane / 4,
// column 8 n + lane % 4 * 2 + e of the block. Each function is for the rows of one warp.
struct GdnTokens {  // the rows of `tokens`
  const float *sum, *exponent, *from, *to_M, *M_factor, *P_factor;
  __device__ __forceinline__ GdnTokens(const void *tokens)
      : sum(static_cast<const float *>(tokens)), exponent(sum + 64), from(sum + 128),
        to_M(sum + 192), M_factor(sum + 320), P_factor(sum + 384) {}
};
// y = x, a column block, times a factor of each row and one of each column.
__device__ __forceinline__ void gdn_scale(
    const float *x, float row0, float row1, const float *columns, float *y, unsigned lane) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float2 f = reinterpret_cast<const float2 *>(columns + 8 * n)[lane % 4];
    y[4 * n] = x[4 * n] * (row0 * f.x), y[4 * n + 1] = x[4 * n + 1] * (row0 * f.y);
    y[4 * n + 2] = x[4 * n + 2] * (row1 * f.x), y[4 * n + 3] = x[4 * n + 3] * (row1 * f.y);
  }
}
// Multiply the factors of the warp's tokens by rk, which the diagonal of k k^T gives; and keep rk
// in `norms`, for all tokens.
__device__ __forceinline__ void gdn_apply_key_norms(
    const float *x, void *tokens, void *scan_factors, float eps, unsigned warp, unsigned lane,
    void *norms = nullptr, bool keep = false) {
  unsigned row = lane % 16, upper = lane < 16;
  float y[8];
  gdn_diagonal(x, warp, y);
  unsigned odd = lane / 4 % 2;
  unsigned owner = row % 8 * 4 + row % 8 / 2;  // of the rows `row` and `row` + 8
  float first = __shfl_sync(0xffffffff, odd ? y[1] : y[0], owner);
  float second = __shfl_sync(0xffffffff, odd ? y[7] : y[6], owner);
  float rk = rsqrtf((row < 8 ? first : second) + eps);
  float *t = static_cast<float *>(tokens) + 16 * warp + row;
  float *f = static_cast<float *>(scan_factors) + 16 * warp + row;
  float *to[3] = {upper ? t + 128 : t + 64, upper ? t + 192 : f, upper ? t + 320 : f + 128};
  *to[0] = upper ? *to[0] * rk : *to[0] - log2f(rk);
  *to[1] *= rk;
  *to[2] *= rk;
  if (keep && upper) static_cast<float *>(norms)[16 * warp + row] = rk;
}
// Store the blocks of -M below the diagonal, from those of k k^T.
template <int parts>
__device__ __forceinline__ void gdn_store_M(
    const float *x, const void *tokens, void *to, unsigned warp, unsigned lane) {
  GdnTokens t(tokens);
  warp = gdn_opaque(warp), lane = gdn_opaque(lane);
  unsigned row = 16 * warp + lane / 4;
  float row0 = t.to_M[row], row1 = t.to_M[row + 8], before = t.sum[16 * warp - (warp > 0)];
  uint4 *place = static_cast<uint4 *>(to) + 32 * parts * (warp * (warp - 1) / 2);
  float y[8], step[3];
#pragma unroll
  for (int b = 0; b < 3; ++b) step[b] = exp2f(before - t.sum[16 * b + 15]);
#pragma unroll
  for (int b = 0; b < 3; ++b)
    if (b < warp) {
      gdn_scale(x + 8 * b, row0 * step[b], row1 * step[b], t.from + 16 * b, y, lane);
      GdnBlock<parts> block;
      block.set(y);
      block.store(place + 32 * parts * b, lane);
    }
}
// Invert the block on the diagonal.
template <int parts>
__device__ __forceinline__ void gdn_invert(
    const float *x, const void *tokens, void *scratch, void *to, unsigned warp, unsigned lane) {
  GdnTokens t(tokens);
  warp = gdn_opaque(warp), lane = gdn_opaque(lane);
  unsigned row = 16 * warp + lane / 4;
  float y[8];
  gdn_diagonal(x, warp, y);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float2 G = reinterpret_cast<const float2 *>(t.exponent + 16 * warp + 8 * n)[lane % 4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float own = t.sum[row + 8 * m], factor = -t.M_factor[row + 8 * m];
      y[4 * n + 2 * m] *= factor * exp2f(own - G.x);
      y[4 * n + 2 * m + 1] *= factor * exp2f(own - G.y);
    }
  }
  gdn_invert_diagonal<parts>(y, scratch, static_cast<uint4 *>(to) + 32 * parts * warp, lane);
}
// Store the largest square of a warp's keys.
__device__ __forceinline__ void gdn_store_key_square(
    const float *x, void *to, unsigned warp, unsigned lane) {
  float y[8];
  gdn_diagonal(x, warp, y);
  bool odd = lane / 4 % 2;
  float larger = fmaxf(odd ? y[1] : y[0], odd ? y[7] : y[6]);
  unsigned bits = lane / 8 == lane % 4 ? __float_as_uint(larger) : 0;
  static_cast<float *>(to)[warp] = __uint_as_float(__reduce_max_sync(0xffffffff, bits));
}
// Store 32 rows of P, number `half`, from those columns of k q^T, its transpose. `tile` has the
// swizzle of 128 bytes. All warps do as much: above the diagonal they store zeros.
template <class Pair>
__device__ __forceinline__ void gdn_store_P(
    const float *x, const void *tokens, void *tile, unsigned half, unsigned warp, unsigned lane) {
  GdnTokens t(tokens);
  warp = gdn_opaque(warp), lane = gdn_opaque(lane);
  unsigned row = 16 * warp + lane / 4, token = lane / 16 * 8 + lane % 8;
  unsigned part = 2 * warp + lane / 8 % 2;
  uint4 *place = static_cast<uint4 *>(tile) + 256 * half + 8 * token + (part ^ token % 8);
  float exponent[2] = {t.exponent[row], t.exponent[row + 8]};
  int ahead = 32 * half + lane % 4 * 2 - row;
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    unsigned word[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      unsigned column = 32 * half + 16 * b + 8 * n;
      float2 G = reinterpret_cast<const float2 *>(t.sum + column)[lane % 4];
      float2 f = reinterpret_cast<const float2 *>(t.P_factor + column)[lane % 4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {  // where P is zero, the product may be infinite
        const float *y = x + 8 * b + 4 * n + 2 * m;
        int distance = ahead + 16 * b + 8 * n - 8 * m;
        Pair pair = gdn_narrow<Pair>(make_float2(
            distance >= 0 ? y[0] * (f.x * exp2f(G.x - exponent[m])) : 0,
            distance >= -1 ? y[1] * (f.y * exp2f(G.y - exponent[m])) : 0));
        word[2 * n + m] = *reinterpret_cast<unsigned *>(&pair);
      }
    }
    tl::ptx_stmatrix_m8n8_x4_trans(place + 128 * b, word[0], word[1], word[2], word[3]);
  }
}
"""
"""CUDA that goes before the kernel."""


@T.macro
def begin_scaled_inverse(
    parts: int, M: Any, inv: Any, tokens: Any, s: Any, warp: Any, lane: Any
) -> None:
    """`begin_inverse` from k k^T, which is in the fragment M."""
    T.call_extern(
        "handle", f"gdn_store_M<{parts}>", M.data, T.address_of(tokens[s, 0, 0]),
        T.address_of(inv.below[0, 0]), warp, lane,
    )  # fmt: skip
    T.call_extern(
        "handle", f"gdn_invert<{parts}>", M.data, T.address_of(tokens[s, 0, 0]),
        T.address_of(inv.scratch[warp, 0]), T.address_of(inv.A_diagonal[0, 0]), warp, lane,
    )  # fmt: skip


@T.macro
def store_P(kqT: Any, P: Any, tokens: Any, s: Any, half: Any, warp: Any, lane: Any) -> None:
    """Store a warp's columns of 32 rows of P, number `half`; the fragment kqT [C, 32] is k q^T."""
    T.call_extern(
        "handle", f"gdn_store_P<{PAIRS[P.dtype]}>", kqT.data, T.address_of(tokens[s, 0, 0]),
        T.address_of(P[s, 0, 0]), half, warp, lane,
    )  # fmt: skip


@T.macro
def apply_key_norms(M: Any, smem: Any, s: Any, warp: Any, lane: Any, *kept: Any) -> None:
    """Multiply the factors of a warp's tokens by rk; the fragment M is k k^T. kept: the address
    that C numbers rk are written to, and whether they are."""
    T.call_extern(
        "handle", "gdn_apply_key_norms", M.data, T.address_of(smem.tokens[s, 0, 0]),
        T.address_of(smem.scan_factors[s, 0, 0]), T.float32(L2_EPS), warp, lane, *kept,
    )  # fmt: skip


@T.macro
def store_key_square(M: Any, squares: Any, warp: Any, lane: Any) -> None:
    """Store the largest square of a warp's keys; the fragment M is k k^T."""
    T.call_extern("handle", "gdn_store_key_square", M.data, T.address_of(squares[0]), warp, lane)


def largest_key_square(squares: Any, l2: bool) -> Any:
    """The largest of all warps; 1 if keys are normalised."""
    if l2:
        return 1.0
    return T.max(T.max(squares[0], squares[1]), T.max(squares[2], squares[3]))
