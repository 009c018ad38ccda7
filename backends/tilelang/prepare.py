"""Stage 1 of forward, a program a chunk and value head: all that needs no state (`couple.py`).

Reads q, k, g and beta; writes `matrices` [slots, HV, 2, C, C], P and A_v, and `walk` [slots, HV, 4,
C] in float32, the factors of every token; for backward (SAVE) also `factors`, G and beta, `norms`,
once a q/k head, and A.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from .couple import Workspace, clear_workspace, couple, save_chunk
from .feed import locate, sum_gates
from .launch import kernel
from .transposed import PRELUDE


class Memory:
    """Shared memory of a chunk. What is coupled takes the place of what is read no more."""

    def __init__(self, K: int, dtype: str) -> None:
        self.q, self.k = (T.alloc_shared((1, C, K), dtype) for _ in range(2))
        self.P, self.A_v = self.q, self.k


@kernel(own_barriers=True)
def prepare(
    *, dtype: str, gates: str, strengths: str, offsets: str, K: int, V: int, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, save: bool,
) -> Any:  # fmt: skip
    """See the module."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots = T.dynamic("slots")

    @T.prim_func
    def prepare_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        g: T.Tensor((B, L, HV), gates), beta: T.Tensor((B, L, HV), strengths),
        A_log: T.Tensor((HV,), "float32"), dt_bias: T.Tensor((HV,), "float32"),
        cu_seqlens: T.Tensor((N + 1,), offsets), matrices: T.Tensor((slots, HV, 2, C, C), dtype),
        walk: T.Tensor((slots, HV, 4, C), "float32"),
        factors: T.Tensor((slots, HV, 2, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"),
        inverses: T.Tensor((slots, HV, C, C), dtype), sequences: T.int32, number: T.int32,
        first: T.int32, span: T.int32, scale: T.float32,
    ):  # fmt: skip
        """number: how many chunks; span: how many of each sequence, from its chunk `first` on."""
        with T.Kernel(number * HV, threads=128, prelude=PRELUDE) as program:
            T.annotate_min_blocks_per_sm(4)
            place = T.alloc_local((6,), "int32")  # kept, so that no access divides again
            place[3] = program // HV
            place[3] = place[3] // span * T.ceildiv(L, C) + first + place[3] % span
            place[4] = program % HV
            place[5] = program % HV // (HV // H)
            slot, head, kh = place[3], place[4], place[5]
            locate(slot, cu_seqlens, sequences, L, C, place, varlen)
            batch = 0 if varlen else place[0]
            at, live = place[1], place[2]
            m = Memory(K, dtype)
            w = Workspace()
            full = T.alloc_barrier([128])
            tx = T.get_thread_binding()
            if live > 0:
                T.tma_copy(k[batch, at : at + C, kh, :], m.k[0, :, :], barrier=full)
                T.tma_copy(q[batch, at : at + C, kh, :], m.q[0, :, :], barrier=full)
                T.barrier_arrive(full)
                clear_workspace(w)
                if tx < 32:
                    sum_gates(
                        g, beta, A_log, dt_bias, batch, head, at, live, w.tokens, tx,
                        gate, bias, sigmoid, double,
                    )  # fmt: skip
                T.barrier_wait(full, 0)
                if live < C:
                    for i, j in T.Parallel(C, K):
                        if i >= live:
                            m.q[0, i, j] = 0
                            m.k[0, i, j] = 0
                    T.fence_proxy_async()
                T.sync_threads(1, 128)
                couple(m, w, walk, slot, head, scale, tx, l2)
                T.fence_proxy_async()
                T.sync_threads(1, 128)
                T.tma_copy(m.P[0, :, 0:C], matrices[slot, head, 0, :, :])
                T.tma_copy(m.A_v[0, :, 0:C], matrices[slot, head, 1, :, :])
                if save:
                    save_chunk(w, factors, norms, inverses, slot, head, kh, tx, l2)
                T.tma_store_wait(0)

    return prepare_kernel
