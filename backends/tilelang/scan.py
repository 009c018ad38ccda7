"""Stage 2 of forward, a program a sequence, value head and block of V: the state, chunk by chunk.

One or two warpgroups carry 64 rows of the transposed state each (`advance.py`); one warp loads up to
three chunks ahead, by TMA. Reads q, k, v, `matrices` and `walk` (see `prepare.py`) and the initial
state; writes o and the final state.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from .advance import ROWS, Tile, advance, load_state, recall, stage_output, store_state
from .couple import STORE
from .launch import kernel

STAGES = 3
"""Chunks in shared memory."""
REGISTERS = (240, 24)
"""Registers a thread of those who carry, and of those who load."""


class Memory:
    """Shared memory of the chunks on their way; o takes v's place there."""

    def __init__(self, K: int, width: int, dtype: str) -> None:
        self.q, self.k = (T.alloc_shared((STAGES, C, K), dtype) for _ in range(2))
        self.v = T.alloc_shared((STAGES, C, width), dtype)
        self.P, self.A_v, self.A_k = (T.alloc_shared((STAGES, C, C), dtype) for _ in range(3))
        self.walk = T.alloc_shared((STAGES, 3, C), "float32")


@kernel(own_barriers=True)
def scan(
    *, dtype: str, offsets: str, K: int, V: int, warpgroups: int, varlen: bool, initial: bool,
    final: bool, v_first: bool,
) -> Any:  # fmt: skip
    """See the module. warpgroups: how many carry a state, 1 or 2."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots = T.dynamic("slots")
    width, carriers = ROWS * warpgroups, 128 * warpgroups
    blocks = V // width
    state = (N, HV, V, K) if v_first else (N, HV, K, V)

    @T.macro
    def carry(
        begin, o, end, m, full, free, n, head, row, batch, start, stop, chunks, wg, thread
    ):  # fmt: skip
        t = Tile(K, dtype)
        if initial:
            load_state(t, begin, n, head, row, v_first)
        else:
            T.clear(t.S)
        for chunk in T.serial(chunks):
            s, at = chunk % STAGES, start + chunk * C
            T.barrier_wait(full[s], chunk // STAGES % 2)
            if at + C > stop:  # what follows the sequence may be anything
                for i, j in T.Parallel(C, K):
                    if at + i >= stop:
                        m.k[s, i, j] = 0
                for i, j in T.Parallel(C, ROWS):
                    if at + i >= stop:
                        m.v[s, i, wg * ROWS + j] = 0
                T.fence_proxy_async()
                T.sync_threads(1 + wg, 128)
            recall(t, m, s, wg)
            if chunk > 0 and thread < 32:
                T.tma_store_wait(0)
                T.barrier_arrive(free[(chunk + STAGES - 1) % STAGES])
            advance(t, m, s)
            stage_output(t, m.v, s, wg, thread)
            T.fence_proxy_async()
            T.sync_threads(1 + wg, 128)
            if at + C <= stop:
                if thread < 32:
                    T.tma_copy(
                        m.v[s, :, wg * ROWS : wg * ROWS + ROWS],
                        o[batch, at : at + C, head, row : row + ROWS],
                        leader_scope_threads=32,
                    )
            else:
                for i, j in T.Parallel(C, ROWS):
                    if at + i < stop:
                        o[batch, at + i, head, row + j] = m.v[s, i, wg * ROWS + j]
        if thread < 32:
            T.tma_store_wait(0)
        if final:
            store_state(t, end, n, head, row, v_first)

    @T.prim_func
    def scan_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        v: T.Tensor((B, L, HV, V), dtype), matrices: T.Tensor((slots, HV, 3, C, C), dtype),
        walk: T.Tensor((slots, HV, 3, C), "float32"), begin: T.Tensor(state, "float32"),
        cu_seqlens: T.Tensor((N + 1,), offsets), o: T.Tensor((B, L, HV, V), dtype),
        end: T.Tensor(state, "float32"), sequences: T.int32,
    ):  # fmt: skip
        with T.Kernel(sequences * HV * blocks, threads=carriers + 128, prelude=STORE) as program:
            n, head = program // (HV * blocks), program // blocks % HV
            first, kh = program % blocks * width, head // (HV // H)
            batch = 0 if varlen else n
            start = T.cast(cu_seqlens[n], "int32") if varlen else 0
            stop = T.cast(cu_seqlens[n + 1], "int32") if varlen else L
            slot = start // C + n if varlen else n * T.ceildiv(L, C)
            chunks = T.ceildiv(stop - start, C)
            m = Memory(K, width, dtype)
            full = T.alloc_barrier([32] * STAGES)
            free = T.alloc_barrier([32 * warpgroups] * STAGES)
            tx = T.get_thread_binding()

            if tx < 128:
                if warpgroups > 1:  # else all have 255 from the start
                    T.set_max_nreg(REGISTERS[0], 1)
                carry(
                    begin, o, end, m, full, free, n, head, first, batch, start, stop, chunks, 0, tx
                )  # fmt: skip
            elif tx < carriers:
                T.set_max_nreg(REGISTERS[0], 1)
                carry(
                    begin, o, end, m, full, free, n, head, first + ROWS, batch, start, stop, chunks,
                    1, tx - 128,
                )  # fmt: skip
            else:
                if warpgroups > 1:
                    T.set_max_nreg(REGISTERS[1], 0)
                if tx < carriers + 32:
                    for chunk in T.serial(chunks):
                        s, at = chunk % STAGES, start + chunk * C
                        T.barrier_wait(free[s], chunk // STAGES % 2 ^ 1)
                        for source, target in (
                            (k[batch, at : at + C, kh, :], m.k[s, :, :]),
                            (v[batch, at : at + C, head, first : first + width], m.v[s, :, :]),
                            (matrices[slot + chunk, head, 1, :, :], m.A_v[s, :, :]),
                            (matrices[slot + chunk, head, 2, :, :], m.A_k[s, :, :]),
                            (q[batch, at : at + C, kh, :], m.q[s, :, :]),
                            (matrices[slot + chunk, head, 0, :, :], m.P[s, :, :]),
                            (walk[slot + chunk, head, :, :], m.walk[s, :, :]),
                        ):
                            T.tma_copy(source, target, barrier=full[s], leader_scope_threads=32)
                        T.barrier_arrive(full[s])

    return scan_kernel
