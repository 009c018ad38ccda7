"""A thread's part of a state in decode: which numbers it holds, and how they are read, summed over
K and written.

[V, K] is shared by `lanes` threads a row, whose sums meet by shuffles; [K, V] by `lanes` threads
across, `rows` rows of K each, whose sums meet by shuffles and, between warps, in shared memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tilelang.language as T


class Shape(NamedTuple):
    """How the threads of a program share a state: `lanes` side by side along its contiguous
    dimension, `rows` a thread along the other; `resident` programs at least a multiprocessor."""

    threads: int
    lanes: int
    rows: int
    resident: int = 1


class Part:
    """A thread's part of a state: `keys` x `values` numbers, in the order of its loads."""

    def __init__(self, shape: Shape, K: int, vec: int, v_first: bool) -> None:
        threads, lanes, rows, _ = shape
        self.lanes, self.vec, self.v_first = lanes, vec, v_first
        self.keys, self.values = (K // lanes, rows) if v_first else (rows, vec)
        self.run = min(vec if v_first else rows, 8)  # keys side by side
        self.parts = lanes if v_first else K // rows  # threads that share a sum
        self.across = threads // self.parts
        self.width = self.across * self.values
        near, far = (1, lanes) if v_first else (lanes, min(32, lanes * self.parts))
        self.steps = [near << i for i in range((far // near).bit_length() - 1)]
        self.warps = 1 if v_first else -(-lanes * self.parts // 32)

    def stand(self, thread: Any, first: Any) -> None:
        """Take the place of a thread in the block of columns of V from `first` on."""
        self.first, self.lane = first, thread % self.lanes
        if self.v_first:
            self.part, self.column = self.lane, thread // self.lanes
        else:
            self.part = thread // self.lanes % self.parts
            self.column = thread // (self.lanes * self.parts) * self.lanes + self.lane

    def key(self, i: Any) -> Any:
        """The key of the thread's i-th row of S."""
        if self.v_first:
            return (i // self.vec * self.lanes + self.lane) * self.vec + i % self.vec
        return self.part * self.keys + i

    def value(self, j: Any) -> Any:
        """The column of V of the thread's j-th column of S."""
        if self.v_first:
            return self.first + j * self.across + self.column
        return self.first + self.column * self.vec + j

    def at(self, i: Any, j: Any) -> Any:
        """Where S[i, j] is kept."""
        return j * self.keys + i if self.v_first else i * self.values + j

    def place(self, m: Any) -> tuple[Any, Any]:
        """Row and column in the pool's layout of what is kept at m."""
        if self.v_first:
            return self.value(m // self.keys), self.key(m % self.keys)
        return self.key(m // self.values), self.value(m % self.values)


@T.macro
def load(to: Any, at: Any, source: Any, index: Any, n: int, wide: bool) -> None:
    """to[at : at + n] = the numbers of source from index on, in one access if wide."""
    bits = n * to.dtype.bits if wide else 0
    if bits == 128:
        to[T.Ramp(at, 1, n)] = T.reinterpret(f"{to.dtype}x{n}", T.ldg128(source[index]))
    elif bits == 64:
        to[T.Ramp(at, 1, n)] = T.reinterpret(f"{to.dtype}x{n}", T.ldg64(source[index]))
    else:
        for e in T.unroll(n):
            to[at + e] = source[(*index[:-1], index[-1] + e)]


@T.macro
def keep(state: Any, slot: Any, head: Any, S: Any, raw: Any, part: Part, wide: bool) -> None:
    """Write the thread's part of a state to a slot."""
    for m in T.unroll(part.keys * part.values):
        raw[m] = T.cast(S[m], raw.dtype)
    for m in T.unroll(part.keys * part.values // part.vec):
        row, column = part.place(m * part.vec)
        if wide:
            word = raw[T.Ramp(m * part.vec, 1, part.vec)]
            T.stg128(state[slot, head, row, column], T.reinterpret("uint32x4", word))
        else:
            state[slot, head, row, column] = raw[m]


@T.macro
def meet(sums: Any, count: int, between: Any, thread: Any, t: Any, part: Part) -> None:
    """Add up the threads' sums over their keys."""
    for step in part.steps:
        for m in T.unroll(count):
            sums[m] += T.shfl_xor(sums[m], step)
    if part.warps > 1:
        tile, warp = thread // (32 * part.warps), thread // 32 % part.warps
        if thread % 32 < part.lanes:
            for m in T.unroll(count):
                between[t % 2, tile, warp, m, part.lane] = sums[m]
        T.sync_threads()
        for m in T.unroll(count):
            sums[m] = 0.0
        for w in T.unroll(part.warps):
            for m in T.unroll(count):
                sums[m] += between[t % 2, tile, w, m, part.lane]
