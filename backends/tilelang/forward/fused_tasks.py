"""The tasks of a thread block of `fused.py`: whole sequences, a value head of each.

Without a ring a thread block has one task. With it, it takes task after task until none is left:
the first by its own number, the others from a counter in memory, since lengths differ. The loading
warp fills a ring of tasks in shared memory, and starts to load a task's chunks while the other
warps are still busy with the one before. Chunks are numbered through, so stages and the parities of
their barriers go on from one task to the next.

A wait of a task depends on this task and earlier ones alone, whatever follows; so sequences without
chunks cannot make two roles wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import tilelang.language as T
from tvm import DataType

from ..tile.indexing import SEQUENCE
from ..tile.pool import READS
from .fused_memory import CHUNKS, HEAD, POOL_SLOT, find_task

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


class Tasks:
    """Shared memory: the tasks, and with a ring the barriers for "it is there" and for "it may be
    written again", at which `users` threads arrive."""

    SLOTS: ClassVar = {True: 4, False: 1}

    def __init__(self, ring: bool, fields: int, users: int) -> None:
        self.ring, self.slots = ring, self.SLOTS[ring]
        self.fields = T.alloc_shared((self.slots, fields), "int32")
        if ring:
            self.ready = T.alloc_barrier([32] * self.slots)
            self.free = T.alloc_barrier([users] * self.slots)

    def __getitem__(self, number: Any) -> Task:
        return Task(self.fields, number % self.slots)


@T.macro
def for_each_task(tasks: Any, do: Callable[..., None], *args: Any) -> None:
    """Call do(task, first, *args) for each task; first: the number of its first chunk. By every
    role but the loading warp."""
    if tasks.ring:
        number, first = T.alloc_var("int32"), T.alloc_var("int32")
        number = 0
        first = 0
        T.barrier_wait(tasks.ready[0], 0)
        while tasks[number][CHUNKS] >= 0:
            do(tasks[number], first, *args)
            first += tasks[number][CHUNKS]
            T.barrier_arrive(tasks.free[number % tasks.slots])
            number += 1
            T.barrier_wait(tasks.ready[number % tasks.slots], number // tasks.slots % 2)
    else:
        do(tasks[0], 0, *args)


@T.macro
def draw_tasks(
    tasks: Any, counter: Any, blocks: Any, HV: Any, number_of_tasks: Any, cta: Any, lane: Any,
    S_in: Any, ends: Any, found: tuple[Any, ...], do: Callable[..., None], *args: Any,
) -> None:  # fmt: skip
    """The loading warp: find each task, then call do as `for_each_task` does. blocks: thread blocks
    of the launch; cta: the number of this one; found: what `find_task` takes after the head."""
    if tasks.ring:
        number, first, index = (T.alloc_var("int32") for _ in range(3))
        number = 0
        first = 0
        index = cta
        while index < number_of_tasks:
            T.barrier_wait(tasks.free[number % tasks.slots], number // tasks.slots % 2 ^ 1)
            if lane == 0:
                find_task(tasks[number], index // HV, index % HV, *found)
                prefetch_state(tasks[number], S_in, ends)
            T.sync_warp()
            T.barrier_arrive(tasks.ready[number % tasks.slots])
            do(tasks[number], first, *args)
            first += tasks[number][CHUNKS]
            number += 1
            index = blocks + T.call_extern("int32", "gdn_draw", T.address_of(counter[0]))
        T.barrier_wait(tasks.free[number % tasks.slots], number // tasks.slots % 2 ^ 1)
        if lane == 0:
            T.buffer_store(tasks.fields, NO_TASK, [number % tasks.slots, CHUNKS])
        T.sync_warp()
        T.barrier_arrive(tasks.ready[number % tasks.slots])
    else:
        do(tasks[0], 0, *args)


@T.macro
def prefetch_state(task: Any, S_in: Any, ends: Any) -> None:
    """Bring the state that a task starts from to the L2 cache, by one thread."""
    rows, columns = S_in.shape[2:]
    size = rows * columns * DataType(S_in.dtype).bits // 8
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
