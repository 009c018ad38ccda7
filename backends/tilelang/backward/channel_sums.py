"""`channel_gradients.py`: gradients through the states, the diagonal, and sums over tokens and
channels, in the layout of `channel_entries.py`.

WGMMA leaves the product of S^T or dS^T, transposed, and rows of tokens in that layout too: 64
channels of K a warpgroup, 64 tokens. `x` is such a product, `r` a factor of each token.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from ..tile.fragments import PAIRS

PRELUDE = """
// r of the two tokens of an entry pair of block b.
__device__ __forceinline__ float2 gdn_of_tokens(const void *r, int b) {
  return static_cast<const float2 *>(r)[4 * b + threadIdx.x % 4];
}
// dq += y, terms = q y,    y = r prefix x,   x = dO S^T
template <class Pair>
__device__ __forceinline__ void gdn_add_dO_S(
    const float *x, const float *prefix, const void *q, const void *r, float *dq, float *terms) {
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    float2 rows[4];
    gdn_entries<Pair>(q, b, rows);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      int n = 4 * b + 2 * w;
      float2 y = gdn_of_tokens(r, b + w / 2);
      y = make_float2(y.x * prefix[n] * x[n], y.y * prefix[n + 1] * x[n + 1]);
      dq[n] += y.x, dq[n + 1] += y.y;
      terms[n] = rows[w].x * y.x, terms[n + 1] = rows[w].y * y.y;
    }
  }
}
// dk += rest y, terms += rest k y, rights = sum over the thread's channels of k y,
// y = r prefix x,   x = R S^T
template <class Pair>
__device__ __forceinline__ void gdn_add_R_S(
    const float *x, const float *prefix, const void *k, const void *r, const void *rest_, float *dk,
    float *terms, float *rights) {
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    float2 rows[4];
    gdn_entries<Pair>(k, b, rows);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      int n = 4 * b + 2 * w, token = 2 * (b + w / 2);
      float2 y = gdn_of_tokens(r, b + w / 2), rest = gdn_of_tokens(rest_, b + w / 2);
      y = make_float2(y.x * prefix[n] * x[n], y.y * prefix[n + 1] * x[n + 1]);
      dk[n] += rest.x * y.x, dk[n + 1] += rest.y * y.y;
      y = make_float2(rows[w].x * y.x, rows[w].y * y.y);
      terms[n] += rest.x * y.x, terms[n + 1] += rest.y * y.y;
      rights[token] = (w % 2 ? rights[token] : 0) + y.x;
      rights[token + 1] = (w % 2 ? rights[token + 1] : 0) + y.y;
    }
  }
}
// dk += y, terms -= k y, from_start += sum of k y over tokens,   y = r suffix x,   x = U dS^T.
// The last token's suffix contains no gate, and its k y may be much larger than what remains.
template <class Pair>
__device__ __forceinline__ void gdn_add_U_dS(
    const float *x, const float *suffix, const void *k, const void *r, int live, float *dk,
    float *terms, float *from_start) {
  float sums[2] = {0, 0};
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    float2 rows[4];
    gdn_entries<Pair>(k, b, rows);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      int n = 4 * b + 2 * w, token = 8 * (b + w / 2) + threadIdx.x % 4 * 2;
      float2 y = gdn_of_tokens(r, b + w / 2);
      y = make_float2(y.x * suffix[n] * x[n], y.y * suffix[n + 1] * x[n + 1]);
      dk[n] += y.x, dk[n + 1] += y.y;
      y.x = token + 1 < live && token < 63 ? rows[w].x * y.x : 0;
      y.y = token + 2 < live && token < 62 ? rows[w].y * y.y : 0;
      terms[n] -= y.x, terms[n + 1] -= y.y;
      sums[w % 2] += y.x + y.y;
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    sums[c] += __shfl_xor_sync(0xffffffff, sums[c], 1);
    from_start[c] += sums[c] + __shfl_xor_sync(0xffffffff, sums[c], 2);
  }
}
// Pairs of equal tokens: dq += d k, dk += d q.
template <class Pair>
__device__ __forceinline__ void gdn_add_diagonal(
    const void *q, const void *k, const void *d, float *dq, float *dk) {
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    float2 q_rows[4], k_rows[4];
    gdn_entries<Pair>(q, b, q_rows), gdn_entries<Pair>(k, b, k_rows);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      int n = 4 * b + 2 * w;
      float2 y = gdn_of_tokens(d, b + w / 2);
      dq[n] += y.x * k_rows[w].x, dq[n + 1] += y.y * k_rows[w].y;
      dk[n] += y.x * q_rows[w].x, dk[n + 1] += y.y * q_rows[w].y;
    }
  }
}
// A warp's rows of a fragment [64, 64] below the diagonal, times factors of rows and columns, to a
// tile of `parts` bfloat16 parts; what is on the diagonal to `diagonal`.
template <int parts>
__device__ __forceinline__ void gdn_put_pairs(
    const float *x, const void *rows_, const void *columns_, void *tile, void *diagonal) {
  int row = threadIdx.x / 32, lane = threadIdx.x % 32, token = 16 * row + lane % 16;
  auto rows = static_cast<const float *>(rows_), columns = static_cast<const float *>(columns_);
  float equal[2];  // i = j, stored behind the loop: a branch here would serialise the products
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    unsigned words[parts][4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      int i = 16 * row + lane / 4 + 8 * (w % 2), j = 16 * b + w / 2 * 8 + lane % 4 * 2;
      const float *from = x + 8 * b + 2 * w;
      float2 y = make_float2(from[0] * rows[i] * columns[j], from[1] * rows[i] * columns[j + 1]);
      equal[w % 2] = i == j ? y.x : i == j + 1 ? y.y : equal[w % 2];
      y = make_float2(i > j ? y.x : 0, i > j + 1 ? y.y : 0);
      gdn_operand<parts>(y, &words[0][w], 4);
    }
#pragma unroll
    for (int p = 0; p < parts; ++p)
      tl::ptx_stmatrix_m8n8_x4(
          static_cast<uint4 *>(tile) + 512 * p + 8 * token + (2 * b + lane / 16 ^ token % 8),
          words[p][0], words[p][1], words[p][2], words[p][3]);
  }
  if (lane % 4 == lane / 8) {
    static_cast<float *>(diagonal)[16 * row + lane / 4] = equal[0];
    static_cast<float *>(diagonal)[16 * row + lane / 4 + 8] = equal[1];
  }
}
// from_start += e^gamma sum of S * dS, of each channel; S_dS: [4][K], quarters of the sums.
template <int K>
__device__ __forceinline__ void gdn_add_e_gamma(
    const float *prefix, const void *S_dS, float *from_start) {
  int lane = threadIdx.x % 32;
  auto sums = static_cast<const float *>(S_dS) + 64 * threadIdx.y + threadIdx.x / 32 * 16;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float total = __shfl_sync(0xffffffff, prefix[29 + 2 * c], lane | 3);  // the last token's
    float sum = 0;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) sum += sums[quarter * K + lane / 4 + 8 * c];
    from_start[c] += total * sum;
  }
}
// dg of entries: `from_start` of their channel, and the sum of `terms` from their token on.
__device__ __forceinline__ void gdn_sum_from_tokens(float *terms, const float *from_start) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float after = from_start[c];
#pragma unroll
    for (int b = 7; b >= 0; --b) {
      int n = 4 * b + 2 * c;
      float mine = terms[n] + terms[n + 1], next = __shfl_xor_sync(0xffffffff, mine, 1);
      float pair = mine + next, others = __shfl_xor_sync(0xffffffff, pair, 2);
      float later = after + (lane & 1 ? 0 : next) + (lane & 2 ? 0 : others);
      terms[n + 1] += later;
      terms[n] += terms[n + 1];
      after += pair + others;
    }
  }
}
// A warp's sums over channels of 16 sums a thread, 2 b + e, for each of 64 tokens.
__device__ __forceinline__ void gdn_sum_channels(float *sums, void *into) {
  int first = threadIdx.x % 4 * 2;
  gdn_halve<8, 4>(sums, first);
  gdn_halve<4, 8>(sums, first);
  gdn_halve<2, 16>(sums, first);
  static_cast<float *>(into)[first] = sums[0], static_cast<float *>(into)[first + 1] = sums[1];
}
// The same of x dx, for a tile x.
template <class Pair>
__device__ __forceinline__ void gdn_dot_rows(const void *tile, const float *dx, void *into) {
  float sums[16];
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    float2 x[4];
    gdn_entries<Pair>(tile, b, x);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float *y = dx + 4 * (b + m);
      sums[2 * (b + m)] = x[2 * m].x * y[0] + x[2 * m + 1].x * y[2];
      sums[2 * (b + m) + 1] = x[2 * m].y * y[1] + x[2 * m + 1].y * y[3];
    }
  }
  gdn_sum_channels(sums, into);
}
// dx - r x in place of x in its tile.
template <class Pair>
__device__ __forceinline__ void gdn_put_gradient(const float *dx, const void *r, void *tile) {
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    float2 x[4];
    gdn_entries<Pair>(tile, b, x);
    unsigned words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      int n = 4 * b + 2 * w;
      float2 f = gdn_of_tokens(r, b + w / 2);
      Pair y = gdn_narrow<Pair>(make_float2(dx[n] - f.x * x[w].x, dx[n + 1] - f.y * x[w].y));
      words[w] = *reinterpret_cast<unsigned *>(&y);
    }
    __syncwarp();
    tl::ptx_stmatrix_m8n8_x4_trans(
        const_cast<uint4 *>(gdn_rows_of(tile, b)), words[0], words[1], words[2], words[3]);
  }
}
"""


def _tile(x: Any) -> Any:
    return T.address_of(x[0, 0, 0])


@T.macro
def add_dO_S(x: Any, smem: Any, regs: Any, r: Any) -> None:
    T.call_extern(
        "handle", f"gdn_add_dO_S<{PAIRS[smem.q.dtype]}>", x.data, regs.prefix.data, _tile(smem.q),
        r, regs.dq.data, regs.terms.data,
    )  # fmt: skip


@T.macro
def add_R_S(x: Any, smem: Any, regs: Any, r: Any) -> None:
    T.call_extern(
        "handle", f"gdn_add_R_S<{PAIRS[smem.q.dtype]}>", x.data, regs.prefix.data, _tile(smem.k),
        r, T.address_of(smem.rest[0]), regs.dk.data, regs.terms.data, regs.rights.data,
    )  # fmt: skip


@T.macro
def add_U_dS(x: Any, smem: Any, regs: Any, r: Any, live: Any) -> None:
    T.call_extern(
        "handle", f"gdn_add_U_dS<{PAIRS[smem.q.dtype]}>", x.data, regs.suffix.data, _tile(smem.k),
        r, live, regs.dk.data, regs.terms.data, regs.from_start.data,
    )  # fmt: skip


@T.macro
def add_diagonal(smem: Any, regs: Any, d: Any) -> None:
    T.call_extern(
        "handle", f"gdn_add_diagonal<{PAIRS[smem.q.dtype]}>", _tile(smem.q), _tile(smem.k), d,
        regs.dq.data, regs.dk.data,
    )  # fmt: skip


@T.macro
def put_pairs(x: Any, rows: Any, columns: Any, tile: Any, diagonal: Any, parts: int) -> None:
    T.call_extern("handle", f"gdn_put_pairs<{parts}>", x.data, rows, columns, tile, diagonal)


@T.macro
def add_e_gamma(smem: Any, regs: Any) -> None:
    T.call_extern(
        "handle", f"gdn_add_e_gamma<{smem.S_dS.shape[1]}>", regs.prefix.data,
        T.address_of(smem.S_dS[0, 0]), regs.from_start.data,
    )  # fmt: skip


@T.macro
def sum_from_tokens(regs: Any) -> None:
    T.call_extern("handle", "gdn_sum_from_tokens", regs.terms.data, regs.from_start.data)


@T.macro
def sum_channels(sums: Any, to: Any) -> None:
    T.call_extern("handle", "gdn_sum_channels", sums.data, to)


@T.macro
def dot_rows(tile: Any, dx: Any, to: Any) -> None:
    T.call_extern("handle", f"gdn_dot_rows<{PAIRS[tile.dtype]}>", _tile(tile), dx.data, to)


@T.macro
def put_gradient(dx: Any, r: Any, tile: Any) -> None:
    T.call_extern("handle", f"gdn_put_gradient<{PAIRS[tile.dtype]}>", dx.data, r, _tile(tile))
