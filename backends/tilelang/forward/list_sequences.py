"""The sequences of a pack that the one kernel computes, where decode takes those of one token.

reads   cu_seqlens [N + 1]
writes  tasks [2 + N]: 0, the counter of `fused_tasks.py`; how many sequences do not have one
        token; and which they are, in any order: no result depends on it
"""

from typing import Any

import tilelang.language as T

from ..compile import kernel
from ..tile.indexing import token_bound

THREADS = 256
COUNTER, COUNT, FIRST = range(3)
"""What `tasks` holds, FIRST and what follows: the sequences."""


@kernel
def list_sequences(*, offsets: str) -> Any:
    """Build the kernel. offsets: dtype of cu_seqlens."""
    entries, bounds = T.dynamic("entries"), T.dynamic("bounds")

    @T.prim_func
    def list_sequences_kernel(
        tasks: T.Tensor((entries,), "int32"), cu_seqlens: T.Tensor((bounds,), offsets), L: T.int32
    ):  # fmt: skip
        with T.Kernel(1, threads=THREADS):
            thread = T.get_thread_binding()
            if thread < FIRST:
                tasks[thread] = 0
            T.sync_threads()
            for step in T.serial(T.ceildiv(bounds - 1, THREADS)):
                n = step * THREADS + thread
                if n < bounds - 1:
                    length = token_bound(cu_seqlens, n + 1, L) - token_bound(cu_seqlens, n, L)
                    if length != 1:
                        place = T.alloc_var("int32")
                        place = T.call_extern("int32", "atomicAdd", T.address_of(tasks[COUNT]), 1)
                        tasks[FIRST + place] = n

    return list_sequences_kernel
