"""The last stage of backward, a program a chunk and q/k head: all gradients but the states'.

One or two warpgroups take 64 columns of K each (`through_states.py`), one the pairs of tokens
(`within_chunk.py`) and, while the next value head is on its way, what is left of a token's own
(`per_token.py`); of the last one's warps one loads, and two write dv. dq and dk are summed over the
value heads of the q/k head in registers, in order, so that runs are bit-equal.

Reads q, k, v, g, dO, `factors`, U^T, S^T, dS^T and, in dv's place, R; writes dq, dk, dv, dg, dbeta
and the partial sums for A_log and dt_bias.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from .launch import kernel
from .per_token import store_gates, store_values
from .sums import PRELUDE
from .through_states import (
    COLUMNS,
    SQUARE_K,
    SQUARE_Q,
    Columns,
    store_columns,
    through_norm,
    through_states,
    within_chunk,
)
from .within_chunk import Pairs, couple_reads, couple_writes, hand_over, multiply_keys

DEAD, TILES, COLUMNS_ALL = range(1, 4)
"""Named barriers."""


class Memory:
    """Shared memory: operands in blocks of 64 columns of K; and, for even and odd value heads, what
    is there of tokens and what warpgroups tell each other."""

    def __init__(self, K: int, V: int, dtype: str) -> None:
        blocks = K // COLUMNS
        self.q, self.k = (T.alloc_shared((blocks, C, COLUMNS), dtype) for _ in range(2))
        self.do, self.R = (T.alloc_shared((2, C, V), dtype) for _ in range(2))
        self.U = T.alloc_shared((2, V, C), dtype)
        self.S, self.dS = (T.alloc_shared((blocks, V, COLUMNS), dtype) for _ in range(2))
        # what pairs of tokens owe each other takes the states' place, when nobody needs them
        fits = blocks * V == 4 * C
        tiles = self.S if fits else T.alloc_shared((2, 2 * C, C), dtype)
        self.F_q, self.F_k = tiles[0, 0:C, :], tiles[0, C : 2 * C, :]
        self.D, self.D_turned = tiles[1, 0:C, :], tiles[1, C : 2 * C, :]
        self.kk, self.qk = (T.alloc_shared((C * C,), dtype) for _ in range(2))
        self.factors = T.alloc_shared((2, 4, C), "float32")
        self.dots = T.alloc_shared((2, 5, blocks, C), "float32")
        self.rows = T.alloc_shared((2, 2, C), "float32")
        self.columns = T.alloc_shared((2, 2, 4, C), "float32")
        self.along, self.weak = (T.alloc_shared((2, C), "float32") for _ in range(2))
        self.carried = T.alloc_shared((2, 4 * blocks), "float32")


class Barriers:
    """Of what is loaded, once and for every value head, and used up; of what is told, likewise."""

    def __init__(self, columns: int) -> None:
        self.keys, self.before, self.after = (T.alloc_barrier(32) for _ in range(3))
        self.tokens = T.alloc_barrier([32] * 2)
        self.before_free, self.after_free = (T.alloc_barrier(columns) for _ in range(2))
        everyone = columns + 128 + 64
        self.free, self.told = (T.alloc_barrier([everyone] * 2) for _ in range(2))
        self.used = T.alloc_barrier([32] * 2)


@T.macro
def clear_dead(x: Any, live: Any) -> None:
    """Zero the rows past the end of the sequence: they may hold anything, NaN too."""
    for b, i, j in T.Parallel(*x.shape):
        if i >= live:
            x[b, i, j] = 0


@T.macro
def load_rows(x: Any, into: Any, full: Any, batch: Any, at: Any, kh: Any) -> None:
    """The chunk's rows of q or k, in blocks, by one warp that has yet to arrive."""
    for b in T.unroll(into.shape[0]):
        T.tma_copy(
            x[batch, at : at + C, kh, b * COLUMNS : b * COLUMNS + COLUMNS],
            into[b, :, :], barrier=full, leader_scope_threads=32,
        )  # fmt: skip


@T.macro
def load_state(x: Any, into: Any, full: Any, slot: Any, head: Any) -> None:
    """S or dS, in blocks, by one warp."""
    for b in T.unroll(into.shape[0]):
        T.tma_copy(
            x[slot, head, :, b * COLUMNS : b * COLUMNS + COLUMNS],
            into[b, :, :], barrier=full, leader_scope_threads=32,
        )  # fmt: skip
    T.barrier_arrive(full)


@kernel(own_barriers=True)
def gradients(
    *, dtype: str, gates: str, strengths: str, K: int, V: int, group: int,
    varlen: bool, l2: bool, gate: bool, bias: bool, sigmoid: bool, double: bool,
) -> Any:  # fmt: skip
    """See the module. group: HV / H."""
    B, L, H, HV = (T.dynamic(name) for name in ("B", "L", "H", "HV"))
    slots, rows, partial = (T.dynamic(name) for name in ("slots", "rows", "partial"))
    blocks = K // COLUMNS
    columns = 128 * blocks
    consumers = columns + 128
    registers = (160, 160, 32) if blocks == 2 else (232, 240, 32)

    @T.macro
    def take_columns(q, k, dq, dk, m, bars, h, batch, at, live, kh, scale, thread):
        c = Columns(dtype)
        T.clear(c.dq)
        T.clear(c.dk)
        T.barrier_wait(bars.keys, 0)
        for g in T.serial(group):
            T.barrier_wait(bars.tokens[g % 2], g // 2 % 2)
            if live < C:
                T.sync_threads(DEAD, consumers)
            through_states(m, c, bars, h, g, scale, thread)
            T.barrier_arrive(bars.told[g % 2])
            T.barrier_arrive(bars.free[g % 2])
        T.sync_threads(TILES, consumers)
        within_chunk(m, c, h)
        if l2:
            through_norm(m.q, c.dq, c, m, 2, SQUARE_Q, h, thread, COLUMNS_ALL)
            through_norm(m.k, c.dk, c, m, 3, SQUARE_K, h, thread, COLUMNS_ALL)
        store_columns(c.dq, c.half, m.q, dq, h, batch, at, live, kh, thread, COLUMNS_ALL)
        store_columns(c.dk, c.half, m.k, dk, h, batch, at, live, kh, thread, COLUMNS_ALL)
        if thread < 32:
            T.tma_store_wait(0)

    @T.prim_func
    def gradients_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        v: T.Tensor((B, L, HV, V), dtype), g: T.Tensor((B, L, HV), gates),
        A_log: T.Tensor((HV,), "float32"), dt_bias: T.Tensor((HV,), "float32"),
        do: T.Tensor((B, L, HV, V), dtype), factors: T.Tensor((slots, HV, 4, C), "float32"),
        U: T.Tensor((slots, HV, V, C), dtype), S: T.Tensor((slots, HV, V, K), dtype),
        dS: T.Tensor((slots, HV, V, K), dtype), spans: T.Tensor((rows, 2), "int32"),
        dq: T.Tensor((B, L, H, K), dtype), dk: T.Tensor((B, L, H, K), dtype),
        dv: T.Tensor((B, L, HV, V), dtype), dg: T.Tensor((B, L, HV), gates),
        dbeta: T.Tensor((B, L, HV), strengths), dA_log: T.Tensor((partial, HV), "float32"),
        ddt_bias: T.Tensor((partial, HV), "float32"), scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(slots, H, threads=consumers + 128, prelude=PRELUDE) as (slot, kh):
            place = T.alloc_local((3,), "int32")  # kept, so that no access divides again
            place[0] = 0 if varlen else slot // T.ceildiv(L, C)
            place[1] = spans[slot, 0] if varlen else slot % T.ceildiv(L, C) * C
            place[2] = spans[slot, 1] if varlen else L - place[1]
            batch, at, live = place[0], place[1], place[2]
            m = Memory(K, V, dtype)
            bars = Barriers(columns)
            tx = T.get_thread_binding()
            if live > 0:
                if tx < 128:
                    T.set_max_nreg(registers[0], 1)
                    take_columns(q, k, dq, dk, m, bars, 0, batch, at, live, kh, scale, tx)
                elif tx < columns:
                    T.set_max_nreg(registers[0], 1)
                    take_columns(q, k, dq, dk, m, bars, 1, batch, at, live, kh, scale, tx - 128)
                elif tx < consumers:
                    T.set_max_nreg(registers[1], 1)
                    p = Pairs(dtype)
                    T.clear(p.F)
                    T.clear(p.D)
                    T.barrier_wait(bars.keys, 0)
                    if live < C:
                        clear_dead(m.q, live)
                        clear_dead(m.k, live)
                    for number in T.serial(group):
                        T.barrier_wait(bars.tokens[number % 2], number // 2 % 2)
                        if live < C:
                            for i, j in T.Parallel(C, V):
                                if i >= live:
                                    m.do[number % 2, i, j] = 0
                                    m.R[number % 2, i, j] = 0
                            T.fence_proxy_async()
                            T.sync_threads(DEAD, consumers)
                        if number == 0:
                            multiply_keys(m, p)
                        couple_writes(m, p, number % 2, tx - columns)
                        couple_reads(m, p, number % 2, scale, tx - columns)
                        T.barrier_arrive(bars.told[number % 2])
                        T.barrier_arrive(bars.free[number % 2])
                        if tx < columns + 32:  # while the next value head's operands come
                            T.barrier_wait(bars.told[number % 2], number // 2 % 2)
                            store_gates(
                                m, g, A_log, dt_bias, dg, dbeta, dA_log, ddt_bias,
                                number % 2, batch, at, live, slot, kh * group + number, scale,
                                tx - columns, gate, bias, sigmoid, double,
                            )  # fmt: skip
                            T.barrier_arrive(bars.used[number % 2])
                    T.barrier_wait(bars.before_free, (group - 1) % 2)
                    hand_over(m, p)
                    T.sync_threads(TILES, consumers)
                else:
                    T.set_max_nreg(registers[2], 0)
                    if tx < consumers + 32:
                        load_rows(q, m.q, bars.keys, batch, at, kh)
                        load_rows(k, m.k, bars.keys, batch, at, kh)
                        T.barrier_arrive(bars.keys)
                        for number in T.serial(group):
                            head = kh * group + number
                            T.barrier_wait(bars.free[number % 2], number // 2 % 2 ^ 1)
                            T.barrier_wait(bars.used[number % 2], number // 2 % 2 ^ 1)
                            for source, target in (
                                (do[batch, at : at + C, head, :], m.do[number % 2, :, :]),
                                (dv[batch, at : at + C, head, :], m.R[number % 2, :, :]),
                                (U[slot, head, :, :], m.U[number % 2, :, :]),
                                (factors[slot, head, :, :], m.factors[number % 2, :, :]),
                            ):
                                T.tma_copy(
                                    source, target, barrier=bars.tokens[number % 2],
                                    leader_scope_threads=32,
                                )  # fmt: skip
                            T.barrier_arrive(bars.tokens[number % 2])
                            T.barrier_wait(bars.after_free, number % 2 ^ 1)
                            load_state(dS, m.dS, bars.after, slot, head)
                            T.barrier_wait(bars.before_free, number % 2 ^ 1)
                            load_state(S, m.S, bars.before, slot, head)
                    elif tx >= consumers + 64:
                        for number in T.serial(group):
                            T.barrier_wait(bars.tokens[number % 2], number // 2 % 2)
                            store_values(
                                m, v, dv, number % 2, batch, at, live, kh * group + number,
                                tx - consumers - 64,
                            )  # fmt: skip
                            T.barrier_arrive(bars.told[number % 2])
                            T.barrier_arrive(bars.free[number % 2])

    return gradients_kernel
