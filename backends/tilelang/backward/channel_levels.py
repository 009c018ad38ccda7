"""`channel_gradients.py`: gradients through the products of a chunk's tokens, level by level.

    dq_i += sum_{j < i} X_ij D_ij * k_j
    right_i = sum_{j < i} Y_ij D_ij * k_j
    dk_i += rest_i right_i + sum_{j > i} D_ji * (X_ji q_j + rest_j Y_ji k_j)

X, Y: [C, C], strictly lower triangular; D_ij: the decays between two tokens, [K]. Levels and
factors f are those of `forward/channel_pairs.py`: at the level where i and j lie in two halves of a
block, D_ij = f_i f_j, so a level is a product of matrices with the rows f * k and f * q, whose
result is multiplied by f again.

Registers have the layout of `channel_entries.py`. X and Y are right operands of `mma`, by
`ldmatrix` as they are or transposed; rows are left ones. Nothing else goes through shared memory
but `terms`, for which there are no registers.

`terms` sums gradient times value, with the sign that dg needs: plus where a row decays up to its
token, minus where from its token on. Both signs take the same rounded operands, so that pairs whose
tokens are both on one side of a gate cancel.
"""

from __future__ import annotations

PRELUDE = """
// What a level has of a thread: its factors, and its sums.
struct GdnLevel {
  float *prefix, *suffix, *dq, *dk, *rights;
  float2 *terms;  // in shared memory, an entry pair every `gdn_threads`
  const void *q, *k, *X, *Y;
  const float *rest;
  // `rest` of the tokens of block b.
  __device__ __forceinline__ float2 rest_of(int b) const {
    return reinterpret_cast<const float2 *>(rest)[4 * b + gdn_opaque(threadIdx.x % 4)];
  }
};
// Operands of the blocks b and b + 1, all of them left tokens (f * k), or right ones (f * q, and
// f * k times rest): word 2 n + c, block n, as `mma` takes them.
template <int parts, class Pair, bool right, bool of_q>
__device__ __forceinline__ void gdn_operands(const GdnLevel &s, int b, unsigned (*to)[4]) {
  float2 x[4];
  gdn_entries<Pair>(of_q ? s.q : s.k, b, x);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float *f = (right ? s.prefix : s.suffix) + 4 * b + 2 * n;
    float2 rest = right && !of_q ? s.rest_of(b + n / 2) : make_float2(1, 1);
    gdn_operand<parts>(make_float2(x[n].x * f[0] * rest.x, x[n].y * f[1] * rest.y), &to[0][n], 4);
  }
}
// Take the results of block b: `dq` and `out` of its four entries. right: whether its tokens are,
// of each of a pair.
template <int parts, class Pair>
__device__ __forceinline__ void gdn_finish_block(
    const GdnLevel &s, int b, bool right0, bool right1, const float2 *q, const float2 *k,
    const float *dq, const float *out) {
  float2 rest = s.rest_of(b);
  rest = make_float2(right0 ? rest.x : 1, right1 ? rest.y : 1);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    int n = 4 * b + 2 * c;
    float2 f = make_float2(
        right0 ? s.prefix[n] : s.suffix[n], right1 ? s.prefix[n + 1] : s.suffix[n + 1]);
    unsigned unused[2];
    float2 q_f = gdn_operand<parts>(make_float2(q[c].x * f.x, q[c].y * f.y), unused, 1);
    float2 k_f = gdn_operand<parts>(
        make_float2(k[c].x * f.x * rest.x, k[c].y * f.y * rest.y), unused, 1);
    s.dq[n] += f.x * dq[2 * c], s.dq[n + 1] += f.y * dq[2 * c + 1];
    s.dk[n] += rest.x * f.x * out[2 * c], s.dk[n + 1] += rest.y * f.y * out[2 * c + 1];
    float2 term = s.terms[n / 2 * gdn_threads];
    term.x += q_f.x * dq[2 * c] + (right0 ? k_f.x : -k_f.x) * out[2 * c];
    term.y += q_f.y * dq[2 * c + 1] + (right1 ? k_f.y : -k_f.y) * out[2 * c + 1];
    s.terms[n / 2 * gdn_threads] = term;
    s.rights[2 * b] += right0 ? k[c].x * f.x * out[2 * c] : 0;
    s.rights[2 * b + 1] += right1 ? k[c].y * f.y * out[2 * c + 1] : 0;
  }
}
// A level of h = 16 or 32: blocks of 8 tokens are right or left as a whole.
template <int h, int parts, class Pair>
__device__ __forceinline__ void gdn_wide_level(GdnLevel s) {
  s.terms += gdn_opaque(0);  // else the terms stay in registers
  constexpr int blocks = h / 8;
  int tile = threadIdx.x % 32 / 8;
  const float zeros[4] = {0, 0, 0, 0};
#pragma unroll
  for (int left = 0; left < 8; left += 2 * blocks) {
    int right = left + blocks;
    unsigned k_left[blocks / 2][parts][4], q_right[blocks / 2][parts][4];
    unsigned k_right[blocks / 2][parts][4];
#pragma unroll
    for (int n = 0; n < blocks / 2; ++n)
      gdn_operands<parts, Pair, false, false>(s, left + 2 * n, k_left[n]);
#pragma unroll
    for (int i = right; i < right + blocks; i += 2) {
      float dq[2][4] = {}, out[2][4] = {};
#pragma unroll
      for (int n = 0; n < blocks / 2; ++n) {
        unsigned X[parts][4], Y[parts][4];
        int row = i + tile / 2, column = left + 2 * n + tile % 2;
        gdn_load_blocks<parts, false>(s.X, row, column, X);
        gdn_load_blocks<parts, false>(s.Y, row, column, Y);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          unsigned x[2][2], y[2][2];
#pragma unroll
          for (int p = 0; p < parts; ++p) {
            x[p][0] = X[p][2 * m], x[p][1] = X[p][2 * m + 1];
            y[p][0] = Y[p][2 * m], y[p][1] = Y[p][2 * m + 1];
          }
          gdn_add_product<parts>(dq[m], k_left[n], x);
          gdn_add_product<parts>(out[m], k_left[n], y);
        }
      }
      float2 q[4], k[4];
      gdn_entries<Pair>(s.q, i, q), gdn_entries<Pair>(s.k, i, k);
#pragma unroll
      for (int m = 0; m < 2; ++m)
        gdn_finish_block<parts, Pair>(s, i + m, true, true, q + 2 * m, k + 2 * m, dq[m], out[m]);
    }
#pragma unroll
    for (int n = 0; n < blocks / 2; ++n) {
      gdn_operands<parts, Pair, true, true>(s, right + 2 * n, q_right[n]);
      gdn_operands<parts, Pair, true, false>(s, right + 2 * n, k_right[n]);
    }
#pragma unroll
    for (int j = left; j < right; j += 2) {
      float out[2][4] = {};
#pragma unroll
      for (int n = 0; n < blocks / 2; ++n) {
        unsigned X[parts][4], Y[parts][4];
        int row = right + 2 * n + tile % 2, column = j + tile / 2;
        gdn_load_blocks<parts, true>(s.X, row, column, X);
        gdn_load_blocks<parts, true>(s.Y, row, column, Y);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          unsigned x[2][2], y[2][2];
#pragma unroll
          for (int p = 0; p < parts; ++p) {
            x[p][0] = X[p][2 * m], x[p][1] = X[p][2 * m + 1];
            y[p][0] = Y[p][2 * m], y[p][1] = Y[p][2 * m + 1];
          }
          gdn_add_product<parts>(out[m], q_right[n], x);
          gdn_add_product<parts>(out[m], k_right[n], y);
        }
      }
      float2 k[4];
      gdn_entries<Pair>(s.k, j, k);
#pragma unroll
      for (int m = 0; m < 2; ++m)
        gdn_finish_block<parts, Pair>(
            s, j + m, false, false, k + 2 * m, k + 2 * m, zeros, out[m]);
    }
  }
}
// A level of h = 8 or less: a block row of X and Y has one block [8][8] with pairs, the one on the
// diagonal, or for h = 8 the one left of it. Two blocks of tokens at a time, b and b + 1.
template <int h, int parts, class Pair>
__device__ __forceinline__ void gdn_narrow_level(GdnLevel s) {
  s.terms += gdn_opaque(0);  // else the terms stay in registers
  int lane = threadIdx.x % 32, tile = lane / 8, row = lane / 4, two = lane % 4 * 2;
  // of a pair of entries: those whose row and column are a pair of the level
  unsigned lower = h == 8 ? ~0u : 0, upper = lower;
  if (h < 8) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      unsigned half = 0xffffu << 16 * e;
      if ((row & h) && (row ^ two + e) / h == 1) lower |= half;
      if ((two + e & h) && (row ^ two + e) / h == 1) upper |= half;
    }
  }
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    unsigned as_is[2][4] = {}, across[2][4] = {};  // X and Y of block b, and of b + 1
    {
      // for h = 8 both are the same
      int block = h == 8 ? b + 1 : b + tile / 2;
      const void *matrix = tile % 2 ? s.Y : s.X;
      gdn_load_blocks<parts, false>(matrix, block, h == 8 ? b : block, as_is);
      gdn_load_blocks<parts, true>(matrix, block, h == 8 ? b : block, across);
    }
    float2 q[4], k[4];
    gdn_entries<Pair>(s.q, b, q), gdn_entries<Pair>(s.k, b, k);
    unsigned q_f[2][4] = {}, k_f[2][4] = {};  // words 2 n + c of block b + n
    bool right[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) right[n][e] = h == 8 ? n : (two + e & h) != 0;
      float2 rest = s.rest_of(b + n);
      rest = make_float2(right[n][0] ? rest.x : 1, right[n][1] ? rest.y : 1);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int at = 4 * (b + n) + 2 * c, w = 2 * n + c;
        float2 f = make_float2(
            right[n][0] ? s.prefix[at] : s.suffix[at],
            right[n][1] ? s.prefix[at + 1] : s.suffix[at + 1]);
        gdn_operand<parts>(make_float2(q[w].x * f.x, q[w].y * f.y), &q_f[0][w], 4);
        gdn_operand<parts>(
            make_float2(k[w].x * f.x * rest.x, k[w].y * f.y * rest.y), &k_f[0][w], 4);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float dq[4] = {}, out[4] = {};
      unsigned a[2][4], x[2][2];
      if (h < 8 || n == 1) {  // right tokens: k of left ones, times X
        int from = h < 8 ? n : 0;
#pragma unroll
        for (int p = 0; p < parts; ++p) {
          a[p][0] = k_f[p][2 * from], a[p][1] = k_f[p][2 * from + 1], a[p][2] = a[p][3] = 0;
          x[p][0] = as_is[p][2 * n] & lower, x[p][1] = 0;
        }
        gdn_add_product<parts>(dq, a, x);
      }
      // right tokens: k of left ones, times Y; left tokens: q and k of right ones, times X and Y
      int from = h < 8 ? n : 1 - n;
#pragma unroll
      for (int p = 0; p < parts; ++p) {
        bool of_q = h < 8 || n == 0;
        a[p][0] = of_q ? q_f[p][2 * from] : 0, a[p][1] = of_q ? q_f[p][2 * from + 1] : 0;
        a[p][2] = k_f[p][2 * from], a[p][3] = k_f[p][2 * from + 1];
        x[p][0] = of_q ? across[p][2 * n] & upper : 0;
        unsigned y = as_is[p][2 * n + 1] & lower, y_across = across[p][2 * n + 1] & upper;
        x[p][1] = h < 8 ? y | y_across : n == 1 ? y : y_across;
      }
      gdn_add_product<parts>(out, a, x);
      gdn_finish_block<parts, Pair>(
          s, b + n, right[n][0], right[n][1], q + 2 * n, k + 2 * n, dq, out);
    }
  }
}
"""
