"""Forward in one kernel, a program a sequence, value head and block of V.

One or two warpgroups carry 64 rows of the transposed state each (`advance.py`); one works a chunk
ahead of them on what needs no state (`couple.py`); the warps of the last one load, further ahead:
the tensors by TMA, the gates with their sums, and the norms of q and k (`feed.py`).

Reads q, k, v, g, beta and the initial state, writes o and the final state, each once; for backward
(SAVE) also G, beta, the norms and the inverse of every chunk.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from .advance import ROWS, STORE_TRANSPOSED, Tile, advance, load_state, recall, stage_output, store_state
from .couple import Workspace, clear_workspace, couple, save_chunk
from .feed import norms, sum_gates
from .launch import kernel

KEYS, VALUES = 3, 2
"""Chunks of q and k, and of v and the coupled matrices, that shared memory holds."""


class Memory:
    """Shared memory of the chunks on their way."""

    def __init__(self, K: int, width: int, dtype: str) -> None:
        self.q, self.k = (T.alloc_shared((KEYS, C, K), dtype) for _ in range(2))
        self.v = T.alloc_shared((VALUES, C, width), dtype)
        self.A_v, self.A_k, self.P = (T.alloc_shared((VALUES, C, C), dtype) for _ in range(3))
        self.G, self.beta, self.rq, self.rk = (
            T.alloc_shared((KEYS, C), "float32") for _ in range(4)
        )
        self.onto, self.read = (T.alloc_shared((VALUES, C), "float32") for _ in range(2))
        self.decay = T.alloc_shared((VALUES, 4), "float32")


@kernel(own_barriers=True)
def fused(
    *, dtype: str, gates: str, strengths: str, offsets: str, K: int, V: int, warpgroups: int,
    varlen: bool, l2: bool, gate: bool, bias: bool, sigmoid: bool, double: bool,
    initial: bool, final: bool, v_first: bool, save: bool,
) -> Any:  # fmt: skip
    """See the module. warpgroups: how many carry a state, 1 or 2."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots = T.dynamic("slots")
    width = ROWS * warpgroups
    blocks = V // width
    carriers, loader = 128 * warpgroups, 128 * warpgroups + 128
    state = (N, HV, V, K) if v_first else (N, HV, K, V)
    registers = (216, 152, 40) if warpgroups == 1 else (192, 96, 32)

    @T.macro
    def load_v(v, m, full, batch, start, chunk, head, row, wg):
        s, at = chunk % VALUES, start + chunk * C
        T.tma_copy(
            v[batch, at : at + C, head, row : row + ROWS], m.v[s, :, wg * ROWS : wg * ROWS + ROWS],
            barrier=full[s], leader_scope_threads=32,
        )
        T.barrier_arrive(full[s])

    @T.macro
    def carry(v, begin, o, end, m, coupled, values_full, keys_free, matrices_free, n, head, batch, first, start, stop, thread, wg):
        t = Tile(K, dtype)
        row = first + wg * ROWS
        if initial:
            load_state(t, begin, n, head, row, v_first)
        else:
            T.clear(t.S)
        chunks = T.ceildiv(stop - start, C)
        for chunk in T.unroll(VALUES):
            if chunk < chunks:
                if thread < 32:
                    load_v(v, m, values_full, batch, start, chunk, head, row, wg)
        for chunk in T.serial(chunks):
            s, s_k = chunk % VALUES, chunk % KEYS
            at = start + chunk * C
            T.barrier_wait(coupled[s], chunk // VALUES % 2)
            T.barrier_wait(values_full[s], chunk // VALUES % 2)
            recall(t, m, s, s_k, wg)
            if thread < 32:
                if 0 < chunk and chunk + 1 < chunks:
                    T.tma_store_wait(0)
                    load_v(v, m, values_full, batch, start, chunk + 1, head, row, wg)
            advance(t, m, s, s_k)
            T.barrier_arrive(keys_free[s_k])
            T.barrier_arrive(matrices_free[s])
            # v's place in shared memory is o's now
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
    def fused_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        v: T.Tensor((B, L, HV, V), dtype), g: T.Tensor((B, L, HV), gates),
        beta: T.Tensor((B, L, HV), strengths), A_log: T.Tensor((HV,), "float32"),
        dt_bias: T.Tensor((HV,), "float32"), begin: T.Tensor(state, "float32"),
        cu_seqlens: T.Tensor((N + 1,), offsets), o: T.Tensor((B, L, HV, V), dtype),
        end: T.Tensor(state, "float32"), factors: T.Tensor((slots, HV, 4, C), "float32"),
        inverses: T.Tensor((slots, HV, C, C), dtype), sequences: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(
            sequences * HV * blocks, threads=loader + 128, prelude=STORE_TRANSPOSED
        ) as program:
            n, head = program // (HV * blocks), program // blocks % HV
            first, kh = program % blocks * width, head // (HV // H)
            batch = 0 if varlen else n
            start = T.cast(cu_seqlens[n], "int32") if varlen else 0
            stop = T.cast(cu_seqlens[n + 1], "int32") if varlen else L
            slot = start // C + n if varlen else n * T.ceildiv(L, C)
            chunks = T.ceildiv(stop - start, C)

            m = Memory(K, width, dtype)
            w = Workspace()

            keys_full = T.alloc_barrier([32] * KEYS)
            gates_full = T.alloc_barrier([96 if l2 else 32] * KEYS)
            keys_free = T.alloc_barrier([carriers] * KEYS)
            values_full = T.alloc_barrier([32 * warpgroups] * VALUES)
            matrices_free = T.alloc_barrier([carriers] * VALUES)
            coupled = T.alloc_barrier([128] * VALUES)
            tx = T.get_thread_binding()

            if tx < 128:
                T.set_max_nreg(registers[0], 1)
                carry(v, begin, o, end, m, coupled, values_full, keys_free, matrices_free, n, head, batch, first, start, stop, tx, 0)
            elif tx < carriers:
                T.set_max_nreg(registers[0], 1)
                carry(v, begin, o, end, m, coupled, values_full, keys_free, matrices_free, n, head, batch, first, start, stop, tx - 128, 1)
            elif tx < loader:
                T.set_max_nreg(registers[1], 0)
                clear_workspace(w)
                for chunk in T.serial(chunks):
                    s, s_k = chunk % VALUES, chunk % KEYS
                    live = stop - (start + chunk * C)
                    T.barrier_wait(keys_full[s_k], chunk // KEYS % 2)
                    T.barrier_wait(gates_full[s_k], chunk // KEYS % 2)
                    T.barrier_wait(matrices_free[s], chunk // VALUES % 2 ^ 1)
                    if live < C:
                        T.barrier_wait(values_full[s], chunk // VALUES % 2)
                        for i, j in T.Parallel(C, K):
                            if i >= live:
                                m.k[s_k, i, j] = 0
                        for i, j in T.Parallel(C, width):
                            if i >= live:
                                m.v[s, i, j] = 0
                        T.fence_proxy_async()
                    T.sync_threads(3, 128)
                    couple(m, w, s, s_k, scale, tx - carriers, 3, l2)
                    if save:
                        if program % blocks == 0:
                            save_chunk(m, w, factors, inverses, slot + chunk, head, s_k, tx - carriers, l2)
                    T.fence_proxy_async()
                    T.barrier_arrive(coupled[s])
            else:
                T.set_max_nreg(registers[2], 0)
                if tx < loader + 32:
                    for chunk in T.serial(chunks):
                        s_k = chunk % KEYS
                        at = start + chunk * C
                        T.barrier_wait(keys_free[s_k], chunk // KEYS % 2 ^ 1)
                        T.tma_copy(
                            k[batch, at : at + C, kh, :], m.k[s_k, :, :],
                            barrier=keys_full[s_k], leader_scope_threads=32,
                        )
                        T.tma_copy(
                            q[batch, at : at + C, kh, :], m.q[s_k, :, :],
                            barrier=keys_full[s_k], leader_scope_threads=32,
                        )
                        T.barrier_arrive(keys_full[s_k])
                elif tx < loader + 64:
                    for chunk in T.serial(chunks):
                        s_k = chunk % KEYS
                        at = start + chunk * C
                        T.barrier_wait(keys_free[s_k], chunk // KEYS % 2 ^ 1)
                        sum_gates(
                            g, beta, A_log, dt_bias, batch, head, at, stop - at, m, s_k,
                            tx - loader - 32, gate, bias, sigmoid, double,
                        )
                        T.barrier_arrive(gates_full[s_k])
                elif l2:
                    if tx < loader + 96:
                        for chunk in T.serial(chunks):
                            s_k = chunk % KEYS
                            T.barrier_wait(keys_full[s_k], chunk // KEYS % 2)
                            norms(m.q, m.rq, s_k, stop - start - chunk * C, tx - loader - 64)
                            T.barrier_arrive(gates_full[s_k])
                    else:
                        for chunk in T.serial(chunks):
                            s_k = chunk % KEYS
                            T.barrier_wait(keys_full[s_k], chunk // KEYS % 2)
                            norms(m.k, m.rk, s_k, stop - start - chunk * C, tx - loader - 96)
                            T.barrier_arrive(gates_full[s_k])

    return fused_kernel
