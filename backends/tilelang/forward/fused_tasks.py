"""The tasks of a thread block of `fused.py`. A task is one value head of a sequence or piece.

Without a ring a thread block has one task. With a ring it takes task after task, the first by its
own number. Packed sequences differ in length, so the others come from a counter in memory. Dense
ones do not, so the others are that number plus the thread blocks of the launch, and so on: there is
no counter to set and to wait for. The loading warp finds a task, writes it to a ring in shared
memory and loads its chunks while the other warps still compute the task before. All chunks of a
thread block are numbered in one row, so stages and parities continue from one task to the next.

Each task is computed by one thread block, so results do not depend on the order. No role waits for
a later task than its own: two roles would wait for each other where more sequences without chunks
follow each other than there are slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tilelang.language as T

from ..tile.indexing import SEQUENCE
from ..tile.pool import READS
from .fused_memory import CHUNKS, HEAD, POOL_SLOT, find_task
from .list_sequences import FIRST

PRELUDE = """
// Draw the next number from a counter in memory, by a warp.
__device__ __forceinline__ int gdn_draw(void *counter) {
  int number = 0;
  if (threadIdx.x % 32 == 0) number = atomicAdd(static_cast<int *>(counter), 1);
  return __shfl_sync(0xffffffff, number, 0);
}
// Bring memory to the L2 cache, by one thread. bytes: a multiple of 16.
__device__ __forceinline__ void gdn_prefetch(const void *from, int bytes) {
#ifdef __CUDA_ARCH__
  unsigned long long at = reinterpret_cast<unsigned long long>(from) & ~15ull;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#endif
}
"""
"""CUDA that goes before the kernel."""
NO_TASK = -1
"""CHUNKS after the last task."""


class Task:
    """A task's fields in shared memory, by index (`fused_memory.py`)."""

    def __init__(self, fields: Any, slot: Any) -> None:
        self.fields, self.slot = fields, slot

    def __getitem__(self, field: Any) -> Any:
        return self.fields[self.slot, field]

    def __setitem__(self, field: Any, value: Any) -> None:
        T.buffer_store(self.fields, value, [self.slot, field])


SLOTS = 4
"""Tasks in the ring."""


def slot_of(number: Any) -> Any:
    """The slot of a task of the ring."""
    return T.cast(number % T.uint32(SLOTS), "int32")


def phase_of(number: Any) -> Any:
    """The parity of the barriers of its slot."""
    return T.cast(number // T.uint32(SLOTS) % T.uint32(2), "int32")


def task_barriers(ring: bool, users: int) -> tuple[Any, Any]:
    """The barriers of the ring's slots: for "the task is there", and for "it may be overwritten",
    at which `users` threads arrive."""
    if not ring:
        return None, None
    return T.alloc_barrier([32] * SLOTS), T.alloc_barrier([users] * SLOTS)


class Tasks:
    """Shared memory: the tasks. ready, free: from `task_barriers`."""

    def __init__(self, fields: int, ready: Any, free: Any) -> None:
        self.ring, self.ready, self.free = ready is not None, ready, free
        self.fields = T.alloc_shared((SLOTS if self.ring else 1, fields), "int32")

    def __getitem__(self, number: Any) -> Task:
        return Task(self.fields, slot_of(number) if self.ring else 0)


@T.macro
def for_each_task(tasks: Any, do: Callable[..., None], *args: Any) -> None:
    """Call do(task, first, *args) for each task; first: the number of its first chunk. By every
    role but the loading warp."""
    if tasks.ring:
        number, first = T.alloc_var("uint32"), T.alloc_var("uint32")
        number = T.uint32(0)
        first = T.uint32(0)
        T.barrier_wait(tasks.ready[0], 0)
        while tasks[number][CHUNKS] >= 0:
            do(tasks[number], first, *args)
            first += T.cast(tasks[number][CHUNKS], "uint32")
            T.barrier_arrive(tasks.free[slot_of(number)])
            number += T.uint32(1)
            T.barrier_wait(tasks.ready[slot_of(number)], phase_of(number))
    else:
        do(tasks[0], 0, *args)


@T.macro
def draw_tasks(
    tasks: Any, counter: Any, blocks: Any, HV: Any, number_of_tasks: Any, cta: Any, lane: Any,
    counts: bool, listed: bool, S_in: Any, ends: Any, found: tuple[Any, ...],
    do: Callable[..., None], *args: Any,
) -> None:  # fmt: skip
    """The loading warp: find each task, then call do as `for_each_task` does. blocks: thread blocks
    of the launch; cta: the number of this one; counts: whether tasks come from the counter; listed:
    whether the sequences come from what `list_sequences` writes behind it; found: what `find_task`
    takes after the head."""
    if tasks.ring:
        number, first = T.alloc_var("uint32"), T.alloc_var("uint32")
        index, end = T.alloc_var("int32"), T.alloc_var("int32")
        number = T.uint32(0)
        first = T.uint32(0)
        index = cta
        end = number_of_tasks
        while index < end:
            T.barrier_wait(tasks.free[slot_of(number)], phase_of(number) ^ 1)
            if lane == 0:
                sequence = counter[FIRST + index // HV] if listed else index // HV
                find_task(tasks[number], sequence, index % HV, *found)
                prefetch_state(tasks[number], S_in, ends)
            T.sync_warp()
            T.barrier_arrive(tasks.ready[slot_of(number)])
            do(tasks[number], first, *args)
            first += T.cast(tasks[number][CHUNKS], "uint32")
            number += T.uint32(1)
            if counts:
                index = blocks + T.call_extern("int32", "gdn_draw", T.address_of(counter[0]))
            else:
                index += blocks
        T.barrier_wait(tasks.free[slot_of(number)], phase_of(number) ^ 1)
        if lane == 0:
            T.buffer_store(tasks.fields, NO_TASK, [slot_of(number), CHUNKS])
        T.sync_warp()
        T.barrier_arrive(tasks.ready[slot_of(number)])
    else:
        do(tasks[0], 0, *args)


@T.macro
def prefetch_state(task: Any, S_in: Any, ends: Any) -> None:
    """Bring the state that a task starts from to the L2 cache, by one thread."""
    rows, columns = S_in.shape[2:]
    size = rows * columns * S_in.dtype.bits // 8
    if ends.pool_in is not None:
        if task[POOL_SLOT + READS] != 0:
            T.call_extern(
                "handle", "gdn_prefetch", T.address_of(S_in[task[POOL_SLOT], task[HEAD], 0, 0]),
                size,
            )  # fmt: skip
    elif ends.initial:
        T.call_extern(
            "handle", "gdn_prefetch", T.address_of(S_in[task[SEQUENCE], task[HEAD], 0, 0]), size
        )
