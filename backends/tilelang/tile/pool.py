"""States in the slots of a pool: the arguments of kernels that read and write them, and which slot
a sequence has.

A pool is [slots, HV, K, V], or [slots, HV, V, K] if v_first, with any stride between slots.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from .pool_kind import PoolKind

PRELUDE = """
template <class X> struct alignas(2 * sizeof(X)) gdn_neighbours { X x, y; };
// Load to a fragment [64, K] in float32, S, the 64 rows of a state [V, K] that begin at `rows`, or
// store it there: two numbers an access, if the address allows it. By a warpgroup.
template <int K, class X> __device__ __forceinline__ X *gdn_own_numbers(X *rows) {
  return rows + (threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) * K + threadIdx.x % 4 * 2;
}
template <int K, class X>
__device__ __forceinline__ void gdn_load_state(const X *rows, float *S) {
  const X *from = gdn_own_numbers<K>(rows);
  bool together = reinterpret_cast<size_t>(from) % sizeof(gdn_neighbours<X>) == 0;
  if (together) {
#pragma unroll
    for (int n = 0; n < K / 4; ++n) {
      const X *at = from + n % 2 * 8 * K + n / 2 * 8;
      gdn_neighbours<X> two = *reinterpret_cast<const gdn_neighbours<X> *>(at);
      S[2 * n] = static_cast<float>(two.x), S[2 * n + 1] = static_cast<float>(two.y);
    }
  } else {
#pragma unroll
    for (int n = 0; n < K / 2; ++n)
      S[n] = static_cast<float>(from[n / 2 % 2 * 8 * K + n / 4 * 8 + n % 2]);
  }
}
template <int K, class X>
__device__ __forceinline__ void gdn_store_state(X *rows, const float *S) {
  X *to = gdn_own_numbers<K>(rows);
  bool together = reinterpret_cast<size_t>(to) % sizeof(gdn_neighbours<X>) == 0;
  if (together) {
#pragma unroll
    for (int n = 0; n < K / 4; ++n) {
      gdn_neighbours<X> two{static_cast<X>(S[2 * n]), static_cast<X>(S[2 * n + 1])};
      *reinterpret_cast<gdn_neighbours<X> *>(to + n % 2 * 8 * K + n / 2 * 8) = two;
    }
  } else {
#pragma unroll
    for (int n = 0; n < K / 2; ++n)
      to[n / 2 % 2 * 8 * K + n / 4 * 8 + n % 2] = static_cast<X>(S[n]);
  }
}
"""
"""CUDA that goes before kernels whose scans load and store states of a pool [V, K]. The stride
between slots may be odd, so TileLang would move a number at a time, and half of a sector."""


def declare_states(name: str, shape: tuple[Any, ...], kind: PoolKind | None) -> Any:
    """The declaration of states [n, HV, ...]: a pool, or contiguous and in float32."""
    if kind is None:
        return T.Tensor(shape, "float32")
    slot = T.dynamic(f"{name}_stride", "int64")
    return T.StridedTensor(shape, (slot, shape[2] * shape[3], shape[3], 1), kind.dtype)


def declare_slots(kind: PoolKind | None) -> tuple[Any, Any]:
    """The declarations of state_indices and fresh [N]."""
    N, stride = T.dynamic("n_slots"), T.dynamic("indices_stride", "int64")
    indices = kind.indices if kind else ""
    return T.StridedTensor((N,), (stride,), indices or "int32"), T.Tensor((N,), "bool")


def declare_checkpoints(shape: tuple[Any, ...], kind: PoolKind | None) -> tuple[Any, Any, Any]:
    """The declarations of checkpoint_offsets and checkpoint_indices [N, C], and of the states that
    they name, of a shape [HV, ...]: the pool, or a buffer of N C states."""
    N, columns, rows = (T.dynamic(name) for name in ("n_offsets", "columns", "rows"))
    offsets, places = (kind.offsets, kind.places) if kind else ("", "")
    return (
        T.Tensor((N, columns), offsets or "int32"),
        T.Tensor((N, columns), places or "int32"),
        declare_states("checkpoints", (rows, *shape), kind),
    )


def is_pool_slot(slot: Any, null_index: Any, slots: Any) -> Any:
    """Whether a slot is one of the pool's and not null_index."""
    return T.And(slot != null_index, T.And(slot >= 0, slot < slots))


READS, WRITES = 1, 2
"""After the slot in what `find_slot` writes: whether the sequence reads it, and writes it."""
SKIPPED = -1
"""The slot of a sequence that has none."""


@T.macro
def find_slot(
    place: Any, at: int, indices: Any, fresh: Any, null_index: Any, slots: Any, n: Any,
    has_tokens: Any, kind: PoolKind,
) -> None:  # fmt: skip
    """Write the slot of sequence n to place[at], or SKIPPED, and READS and WRITES after it."""
    slot = T.cast(indices[n] if bool(kind.indices) else n, "int64")
    live = is_pool_slot(slot, null_index, slots)
    starts = fresh[n] if kind.fresh else False
    place[at] = T.cast(T.if_then_else(live, slot, T.int64(SKIPPED)), "int32")
    place[at + READS] = T.if_then_else(T.And(live, T.And(has_tokens, T.Not(starts))), 1, 0)
    place[at + WRITES] = T.if_then_else(T.And(live, T.Or(has_tokens, starts)), 1, 0)
