"""Stage 2 of forward, a program a piece, value head and block of V: the state, chunk by chunk.

One or two warpgroups carry 64 rows of the transposed state each (`advance.py`); one warp loads up
to three chunks ahead, by TMA. Reads q, k, v, `matrices` and `walk` (see `prepare.py`) and the state
that a piece begins with; writes o and the state that it ends with.

A piece is a sequence; or, where sequences are few, they are cut into pieces that are walked at the
same time, twice: first (TRANSFER) for what each leaves of a zero state, and, with v = 0, of the
rows of a unit matrix, which says what it does to any state; then, after `carry.py`, for o, from
the states they really begin with. (The first walk is written as if it computed an o as well, of
whatever is in q's and P's place: without, ptxas makes every product wait for the one before. It
leaves out the products that nobody reads.)
"""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from .advance import (
    Tile,
    advance,
    load_state,
    recall,
    stage_output,
    store_state,
    unit_state,
)
from .constants import ROWS
from .feed import span
from .launch import kernel
from .transposed import PRELUDE

STAGES = 3
"""Chunks in shared memory."""
REGISTERS = (240, 24)
"""Registers a thread of those who carry, and of those who load, where two warpgroups carry."""


class Memory:
    """Shared memory of the chunks on their way; o takes v's place there."""

    def __init__(self, K: int, warpgroups: int, dtype: str) -> None:
        self.q, self.k = (T.alloc_shared((STAGES, C, K), dtype) for _ in range(2))
        self.v = T.alloc_shared((STAGES * warpgroups, C, ROWS), dtype)
        self.P, self.A_v = (T.alloc_shared((STAGES, C, C), dtype) for _ in range(2))
        self.walk = T.alloc_shared((STAGES, 4, C), "float32")
        T.annotate_layout({self.v: make_full_bank_swizzled_layout(self.v)})


@kernel(own_barriers=True)
def scan(
    *, dtype: str, offsets: str, K: int, V: int, warpgroups: int, varlen: bool, initial: bool,
    final: bool, v_first: bool, cut: bool, transfer: bool,
) -> Any:  # fmt: skip
    """See the module. warpgroups: how many carry a state, 1 or 2; transfer wants 1, and final."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots, bounds = T.dynamic("slots"), T.dynamic("bounds")
    width, carriers = ROWS * warpgroups, 128 * warpgroups
    rows = V + K if transfer else V
    blocks = rows // width
    inner = (rows, K) if v_first else (K, rows)

    @T.macro
    def carry(
        begin, o, end, m, full, free, piece, head, row, batch, start, stop, chunks, wg, thread
    ):  # fmt: skip
        t = Tile(K, dtype)
        if transfer:
            unit_state(t, row - V)
            if row >= V:
                for s, i, j in T.Parallel(STAGES, C, ROWS):
                    m.v[s, i, j] = 0
                T.sync_threads(1, 128)
        elif initial:
            load_state(t, begin, piece, head, row, v_first)
        else:
            T.clear(t.S)
        T.copy(t.S, t.before)
        for chunk in T.serial(chunks):
            s, at = chunk % STAGES, start + chunk * C
            place = s * warpgroups + wg
            T.barrier_wait(full[s], chunk // STAGES % 2)
            if at + C > stop:  # what follows the sequence may be anything
                for i, j in T.Parallel(C, K):
                    if at + i >= stop:
                        m.k[s, i, j] = 0
                for i, j in T.Parallel(C, ROWS):
                    if at + i >= stop:
                        m.v[place, i, j] = 0
                T.fence_proxy_async()
                T.sync_threads(1 + wg, 128)
            recall(t, m, s, place, thread)
            if chunk > 0 and thread < 32:
                T.tma_store_wait(0)
                T.barrier_arrive(free[(chunk + STAGES - 1) % STAGES])
            advance(t, m, s)
            if not transfer:
                stage_output(t, m.v, place, thread)
                T.fence_proxy_async()
            T.sync_threads(1 + wg, 128)
            if transfer:
                pass
            elif at + C <= stop:
                if thread < 32:
                    T.tma_copy(
                        m.v[place, :, :],
                        o[batch, at : at + C, head, row : row + ROWS],
                        leader_scope_threads=32,
                    )
            else:
                for i, j in T.Parallel(C, ROWS):
                    if at + i < stop:
                        o[batch, at + i, head, row + j] = m.v[place, i, j]
        if thread < 32:
            T.tma_store_wait(0)
        if final:
            store_state(t, end, piece, head, row, v_first)

    @T.prim_func
    def scan_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        v: T.Tensor((B, L, HV, V), dtype), matrices: T.Tensor((slots, HV, 2, C, C), dtype),
        walk: T.Tensor((slots, HV, 4, C), "float32"), begin: T.Tensor((N, HV, *inner), "float32"),
        cu_seqlens: T.Tensor((bounds,), offsets), o: T.Tensor((B, L, HV, V), dtype),
        end: T.Tensor((N, HV, *inner), "float32"), sequences: T.int32, pieces: T.int32,
        length: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece; sequences, pieces: how many."""
        with T.Kernel(pieces * HV * blocks, threads=carriers + 128, prelude=PRELUDE) as program:
            place = T.alloc_local((7,), "int32")  # kept, so that no access divides again
            place[4] = program // (HV * blocks)
            place[5] = program // blocks % HV
            place[6] = program // blocks % HV // (HV // H)
            piece, head, kh = place[4], place[5], place[6]
            first = program % blocks * width
            span(piece, cu_seqlens, sequences, L, length, place, varlen, cut)
            batch = 0 if varlen else place[0]
            start, stop, slot = place[1], place[2], place[3]
            chunks = T.ceildiv(T.max(stop - start, 0), C)
            m = Memory(K, warpgroups, dtype)
            full = T.alloc_barrier([32] * STAGES)
            free = T.alloc_barrier([32 * warpgroups] * STAGES)
            tx = T.get_thread_binding()

            if tx < 128:
                if warpgroups > 1:  # else all have enough from the start
                    T.set_max_nreg(REGISTERS[0], 1)
                carry(
                    begin, o, end, m, full, free, piece, head, first, batch, start, stop, chunks, 0,
                    tx,
                )  # fmt: skip
            elif tx < carriers:
                T.set_max_nreg(REGISTERS[0], 1)
                carry(
                    begin, o, end, m, full, free, piece, head, first + ROWS, batch, start, stop,
                    chunks, 1, tx - 128,
                )  # fmt: skip
            else:
                if warpgroups > 1:
                    T.set_max_nreg(REGISTERS[1], 0)
                if tx < carriers + 32:
                    for chunk in T.serial(chunks):
                        s, at = chunk % STAGES, start + chunk * C
                        T.barrier_wait(free[s], chunk // STAGES % 2 ^ 1)
                        T.tma_copy(
                            k[batch, at : at + C, kh, :], m.k[s, :, :],
                            barrier=full[s], leader_scope_threads=32,
                        )  # fmt: skip
                        if first < V:
                            for wg in T.unroll(warpgroups):
                                row = first + wg * ROWS
                                T.tma_copy(
                                    v[batch, at : at + C, head, row : row + ROWS],
                                    m.v[s * warpgroups + wg, :, :],
                                    barrier=full[s], leader_scope_threads=32,
                                )  # fmt: skip
                        T.tma_copy(
                            matrices[slot + chunk, head, 1, :, :], m.A_v[s, :, :],
                            barrier=full[s], leader_scope_threads=32,
                        )  # fmt: skip
                        if not transfer:
                            for source, target in (
                                (q[batch, at : at + C, kh, :], m.q[s, :, :]),
                                (matrices[slot + chunk, head, 0, :, :], m.P[s, :, :]),
                            ):
                                T.tma_copy(source, target, barrier=full[s], leader_scope_threads=32)
                        T.tma_copy(
                            walk[slot + chunk, head, :, :], m.walk[s, :, :],
                            barrier=full[s], leader_scope_threads=32,
                        )  # fmt: skip
                        T.barrier_arrive(full[s])

    return scan_kernel
