"""The pairs of `channel_pairs.py` within blocks of 16 tokens: four levels, or one product.

Where no channel of the chunk falls below 2^-60 over eight tokens, the decay between i and j is
f_i f_j for all of them: f_i is the decay from the middle of the block to i, f_j that from j to the
middle, and the one that goes backwards is a reciprocal, at most 2^60. So one product takes the
place of four. Products of pairs i < j may be infinite; they are dropped by a selection.

Levels remain for chunks in which a channel decays faster. With a lower bound of -5 none does: there
e^-40 is left.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from ..tile.fragments import PAIRS
from ..tile.gate_math import always_slow
from .channel_pairs import NEAR, add_level, join_halves, put_level
from .channel_pairs import PRELUDE as LEVELS

PRELUDE = (
    LEVELS
    + """
// Whether a channel of the warp falls below 2^-60 over eight tokens; decays: of each token.
template <int K> __device__ __forceinline__ unsigned gdn_decays_fast(const float *decays) {
  unsigned fast = 0;
#pragma unroll
  for (int i = 0; i < K / 8; i += 8)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float left = 1;
#pragma unroll
      for (int n = 0; n < 8; ++n) left *= decays[2 * (i + n) + c];
      fast |= !(left >= 0x1p-60f);
    }
  return __reduce_max_sync(0xffffffff, fast);
}
// Rows times their decays from the middle of each block of 16 tokens (q's, and k's to `k_left`),
// and k's times those to the middle; from factors of blocks of 8 tokens.
template <int K, int parts, class Pair>
__device__ __forceinline__ void gdn_put_near(
    const float *prefix, const float *suffix, const void *q, const void *k, void *q_rows,
    void *k_left, void *k_rows) {
  constexpr int tokens = K / 8;
  int first = threadIdx.x / (K / 2) * tokens, pair = threadIdx.x % (K / 2);
#pragma unroll
  for (int i = 0; i < tokens; ++i) {
    int at = (first + i) * (K / 2) + pair;
    bool right = (tokens > 8 ? i : first) & 8;
    float2 f = make_float2(
        right ? prefix[2 * i] : suffix[2 * i], right ? prefix[2 * i + 1] : suffix[2 * i + 1]);
    float2 inverse = make_float2(1 / f.x, 1 / f.y);
    float2 from = right ? f : inverse, to = right ? inverse : f;
    float2 row = gdn_widen(static_cast<const Pair *>(k)[at]);
    gdn_put_pair<K, parts>(row, from, k_left, first + i, pair);
    gdn_put_pair<K, parts>(row, to, k_rows, first + i, pair);
    row = gdn_widen(static_cast<const Pair *>(q)[at]);
    gdn_put_pair<K, parts>(row, from, q_rows, first + i, pair);
  }
}
// A warp's sums of the pairs of its block on the diagonal, from the rows of `gdn_put_near`.
template <int K, int parts>
__device__ __forceinline__ void gdn_add_near(
    float *sums, const void *q_rows, const void *k_left, const void *k_rows) {
  int row = gdn_opaque(threadIdx.x / 32 % 4), lane = threadIdx.x % 32;
  float all[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  gdn_multiply_rows<K, parts>(
      all, threadIdx.x < 128 ? q_rows : k_left, 16 * row, k_rows, 16 * row);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    int i = lane / 4 + n / 2 % 2 * 8, j = lane % 4 * 2 + n % 2 + n / 4 * 8;
    sums[n] = i > j ? all[n] : 0;
  }
}
"""
)


@T.macro
def look_for_fast_decay(
    K: int, smem: Any, decays: Any, thread: Any, lower_bound: float | None
) -> None:
    """Write to smem.fast what each warp sees of e^g of its tokens, if `add_near_pairs` asks."""
    if not always_slow(lower_bound):
        seen = T.alloc_local((1,), "uint32")
        seen[0] = T.call_extern("uint32", f"gdn_decays_fast<{K}>", decays.data)
        if thread % 32 == 0:
            smem.fast[thread // 32] = seen[0]


@T.macro
def add_by_levels(
    K: int, parts: int, smem: Any, prefix: Any, suffix: Any, sums: Any, thread: Any
) -> None:
    for h in NEAR:
        T.sync_threads()
        put_level(h, K, parts, smem, prefix, suffix)
        join_halves(h, K, smem, prefix, suffix, thread)
        T.sync_threads()
        add_level(h, K, parts, smem, sums)


@T.macro
def add_at_once(
    K: int, parts: int, smem: Any, prefix: Any, suffix: Any, sums: Any, thread: Any
) -> None:
    for h in NEAR[:-1]:
        join_halves(h, K, smem, prefix, suffix, thread)
    T.sync_threads()
    T.call_extern(
        "handle", f"gdn_put_near<{K}, {parts}, {PAIRS[smem.q.dtype]}>", prefix.data, suffix.data,
        T.address_of(smem.q[0, 0, 0]), T.address_of(smem.k[0, 0, 0]),
        T.address_of(smem.q_rows[0, 0, 0]), T.address_of(smem.k_left[0, 0, 0]),
        T.address_of(smem.k_rows[0, 0, 0]),
    )  # fmt: skip
    join_halves(NEAR[-1], K, smem, prefix, suffix, thread)
    T.sync_threads()
    T.call_extern(
        "handle", f"gdn_add_near<{K}, {parts}>", sums.data, T.address_of(smem.q_rows[0, 0, 0]),
        T.address_of(smem.k_left[0, 0, 0]), T.address_of(smem.k_rows[0, 0, 0]),
    )  # fmt: skip


@T.macro
def add_near_pairs(
    K: int, parts: int, smem: Any, prefix: Any, suffix: Any, sums: Any, thread: Any,
    lower_bound: float | None,
) -> None:  # fmt: skip
    """The pairs within blocks of 16 tokens, to a warp's sums. Leaves the factors of such blocks."""
    if always_slow(lower_bound):
        add_at_once(K, parts, smem, prefix, suffix, sums, thread)
    else:
        fast = T.alloc_var("uint32")
        fast = 0
        for i in T.unroll(8):
            fast |= smem.fast[i]
        if fast != 0:
            add_by_levels(K, parts, smem, prefix, suffix, sums, thread)
        else:
            add_at_once(K, parts, smem, prefix, suffix, sums, thread)
