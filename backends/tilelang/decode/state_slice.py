"""A thread's slice of a state in decode: which numbers it holds, and how it loads, sums and stores
them.

A pool holds states as [K, V] or [V, K]. The slice follows the pool's layout, so that every access
is contiguous.

- [V, K]: `lanes` threads share a row, and their sums over K meet by shuffles.
- [K, V]: `lanes` threads lie across a row, with `rows` rows of K each. Their sums over K meet by
  shuffles, and in shared memory where they are in several warps.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from ..tile.thread_shape import ThreadShape


class StateSlice:
    """A thread's slice: `keys` x `values` numbers, stored in the order of their loads.

    vec: numbers of the pool that one access moves. key_run: keys that lie side by side. k_parts:
    threads that share the sum over K of one column of V. width: columns of V of a thread block.
    warps: warps that share a sum.
    """

    def __init__(self, shape: ThreadShape, K: int, vec: int, v_first: bool) -> None:
        threads, lanes, rows, _ = shape
        self.lanes, self.vec, self.v_first = lanes, vec, v_first
        self.keys, self.values = (K // lanes, rows) if v_first else (rows, vec)
        self.key_run = min(vec if v_first else rows, 8)
        self.k_parts = lanes if v_first else K // rows
        self.across = threads // self.k_parts
        self.width = self.across * self.values
        near, far = (1, lanes) if v_first else (lanes, min(32, lanes * self.k_parts))
        self.shuffles = [near << i for i in range((far // near).bit_length() - 1)]
        self.warps = 1 if v_first else -(-lanes * self.k_parts // 32)

    def place_thread(self, thread: Any, v_start: Any) -> None:
        """Find the slice of this thread in the columns of V from v_start on."""
        self.v_start, self.lane = v_start, thread % self.lanes
        if self.v_first:
            self.k_part, self.column = self.lane, thread // self.lanes
        else:
            self.k_part = thread // self.lanes % self.k_parts
            self.column = thread // (self.lanes * self.k_parts) * self.lanes + self.lane

    def key(self, i: Any) -> Any:
        """The index along K of the thread's i-th key."""
        if self.v_first:
            return (i // self.vec * self.lanes + self.lane) * self.vec + i % self.vec
        return self.k_part * self.keys + i

    def value(self, j: Any) -> Any:
        """The index along V of the thread's j-th value."""
        if self.v_first:
            return self.v_start + j * self.across + self.column
        return self.v_start + self.column * self.vec + j

    def register(self, i: Any, j: Any) -> Any:
        """The register of the i-th key and j-th value."""
        return j * self.keys + i if self.v_first else i * self.values + j

    def pool_index(self, m: Any) -> tuple[Any, Any]:
        """Row and column in the pool's layout of the number in register m."""
        if self.v_first:
            return self.value(m // self.keys), self.key(m % self.keys)
        return self.key(m // self.values), self.value(m % self.values)


@T.macro
def store_slice(
    state: Any, slot: Any, head: Any, S: Any, raw_S: Any, part: StateSlice, wide: bool
) -> None:
    """Store the thread's slice S to a slot of the pool. raw_S: registers in the pool's dtype."""
    for m in T.unroll(part.keys * part.values):
        raw_S[m] = T.cast(S[m], raw_S.dtype)
    for m in T.unroll(part.keys * part.values // part.vec):
        row, column = part.pool_index(m * part.vec)
        if wide:
            word = raw_S[T.Ramp(m * part.vec, 1, part.vec)]
            T.stg128(state[slot, head, row, column], T.reinterpret("uint32x4", word))
        else:
            state[slot, head, row, column] = raw_S[m]


@T.macro
def reduce_over_keys(
    sums: Any, count: int, partial_smem: Any, thread: Any, t: Any, part: StateSlice
) -> None:
    """Add up the sums of the threads that share them. partial_smem [2, ...] has a place for even
    and one for odd tokens, so that one barrier a token is enough."""
    for step in part.shuffles:
        for m in T.unroll(count):
            sums[m] += T.shfl_xor(sums[m], step)
    if part.warps > 1:
        tile, warp = thread // (32 * part.warps), thread // 32 % part.warps
        if thread % 32 < part.lanes:
            for m in T.unroll(count):
                partial_smem[t % 2, tile, warp, m, part.lane] = sums[m]
        T.sync_threads()
        for m in T.unroll(count):
            sums[m] = 0.0
        for w in T.unroll(part.warps):
            for m in T.unroll(count):
                sums[m] += partial_smem[t % 2, tile, w, m, part.lane]
