"""The last stage of backward, chunk by chunk of every q/k head: all gradients but the states'.

One or two warpgroups take 64 columns of K each (`through_states.py`), one the pairs of tokens
(`within_chunk.py`); of the last one's warps one loads, one finishes what is a token's own
(`per_token.py`) and stores dq and dk, and two see to tokens whose beta is weak. dq and dk are
summed over the value heads of the q/k head in registers, in order, so that runs are bit-equal. A
program stays on its multiprocessor and takes every so many chunks: while it finishes one, the next
is on its way. It is the columns' chain of work that takes the time: nothing that others can do, or
that has to be waited for, belongs in it.

Reads q, k, g, dO, `factors`, `norms`, rowsum(R * V), U^T, S^T, dS^T and, in dv's place, `kept` R;
writes dq, dk, dg, dbeta, dv where beta is weak and the partial sums for A_log and dt_bias.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragment_sums import PRELUDE
from ..tile.indexing import rolled_loop
from ..tile.layout import ROWS
from ..tile.ragged_rows import clear_past_end, clear_rows_past_end
from .gradients_gates import mend_weak, store_gates
from .gradients_inter import (
    COLUMNS,
    Columns,
    stage_columns,
    store_columns,
    through_norms,
    through_states,
    within_chunk,
)
from .gradients_intra import (
    Pairs,
    couple_reads,
    couple_writes,
    hand_over,
    keep_norms,
    multiply_keys,
)
from .gradients_memory import (
    AT,
    BATCH,
    DONE,
    HEADS,
    KEY_HEAD,
    LIVE,
    SLOT,
    Barriers,
    Memory,
    find_chunk,
    load_rows,
    load_state,
)

DEAD, TILES, COLUMNS_ALL, PAIRS = range(1, 5)
"""Named barriers."""
REGISTERS = {1: (224, 224, 56), 2: (160, 136, 56)}
"""Registers a thread of those who take columns, who take pairs, and of the others, by the number of
blocks of columns."""


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
    registers = REGISTERS[blocks]

    @T.macro
    def each_chunk(spans, place, first, programs, take, *own):
        """take(*own) for every chunk that is the program's; `place` says where that is."""
        for step in T.serial(T.ceildiv(slots * H - first, programs)):
            find_chunk(first + step * programs, spans, L, H, place, varlen)
            if place[LIVE] > 0:
                take(*own)
                place[DONE] += 1
                place[HEADS] += group

    @T.macro
    def take_columns(c, m, bars, h, place, scale, thread):
        T.clear(c.dq)
        T.clear(c.dk)
        for g in rolled_loop(group):
            r = place[HEADS] + g
            T.barrier_wait(bars.tokens[r % 2], r // 2 % 2)
            if place[LIVE] < C:
                T.sync_threads(DEAD, consumers)
            through_states(m, c, bars, h, r, g, group, place[DONE] % 2, scale, thread)
            T.barrier_arrive(bars.told[r % 2])
            T.barrier_arrive(bars.free[r % 2])
        T.sync_threads(TILES, consumers)
        within_chunk(m, c, h)
        T.barrier_arrive(bars.before_free)  # of the last value head: the tiles had S's place
        if l2:
            through_norms(m, c, place[DONE] % 2, h, bars.keys_free, COLUMNS_ALL, thread)
        else:
            T.barrier_arrive(bars.keys_free)
        stage_columns(m, c, (place[HEADS] + group - 1) % 2, h, COLUMNS_ALL)
        T.barrier_arrive(bars.staged)

    @T.macro
    def take_pairs(p, m, bars, place, scale, thread):
        live, even, before = place[LIVE], place[DONE] % 2, place[HEADS]
        T.barrier_wait(bars.keys, even)
        T.barrier_wait(bars.tokens[before % 2], before // 2 % 2)  # the norms come with them
        if live < C:
            clear_past_end(m.q, live)
            clear_past_end(m.k, live)
            T.fence_proxy_async()
        keep_norms(m, before % 2, even, thread)
        T.sync_threads(PAIRS, 128)
        multiply_keys(m, p, even, scale)
        T.clear(p.F)
        T.clear(p.D)
        for g in rolled_loop(group):
            r = before + g
            b = r % 2
            T.barrier_wait(bars.tokens[b], r // 2 % 2)
            if live < C:
                clear_rows_past_end((m.do, m.R), b, live)
                T.fence_proxy_async()
                T.sync_threads(DEAD, consumers)
            couple_writes(m, p, b, thread)
            couple_reads(m, p, b, thread)
            T.barrier_arrive(bars.told[b])
            T.barrier_arrive(bars.free[b])
        T.barrier_wait(bars.tiles_free, even)
        T.barrier_wait(bars.stored, even ^ 1)
        hand_over(m, p, even, scale)
        T.sync_threads(TILES, consumers)

    @T.macro
    def load(q, k, do, dv, factors, norms, given, U, S, dS, m, bars, place):
        batch, at, slot, kh = place[BATCH], place[AT], place[SLOT], place[KEY_HEAD]
        for g in rolled_loop(group):
            head, r = kh * group + g, place[HEADS] + g
            b = r % 2
            T.barrier_wait(bars.free[b], r // 2 % 2 ^ 1)
            T.barrier_wait(bars.used[b], r // 2 % 2 ^ 1)
            for source, target in (
                (do[batch, at : at + C, head, :], m.do[b, :, :]),
                (dv[batch, at : at + C, head, :], m.R[b, :, :]),
                (U[slot, head, :, :], m.U[b, :, :]),
                (factors[slot, head, :, :], m.factors[b, 0:2, :]),
                (norms[slot, kh, :, :], m.factors[b, 2:4, :]),
                (given[slot, head, :, :], m.factors[b, 4 : 4 + V // ROWS, :]),
            ):
                T.tma_copy(source, target, barrier=bars.tokens[b], leader_scope_threads=32)
            T.barrier_arrive(bars.tokens[b])
            T.barrier_wait(bars.after_free, r % 2 ^ 1)
            load_state(dS, m.dS, bars.after, slot, head)
            if g == 0:
                T.barrier_wait(bars.keys_free, place[DONE] % 2 ^ 1)
                load_rows(q, m.q, bars.keys, batch, at, kh)
                load_rows(k, m.k, bars.keys, batch, at, kh)
                T.barrier_arrive(bars.keys)
            T.barrier_wait(bars.before_free, r % 2 ^ 1)
            load_state(S, m.S, bars.before, slot, head)

    @T.macro
    def finish(dq, dk, g, A_log, dt_bias, dg, dbeta, dA_log, ddt_bias, m, bars, place, scale, lane):
        for number in rolled_loop(group):
            r = place[HEADS] + number
            T.barrier_wait(bars.told[r % 2], r // 2 % 2)
            store_gates(
                m, g, A_log, dt_bias, dg, dbeta, dA_log, ddt_bias, r % 2, place[BATCH], place[AT],
                place[LIVE], place[SLOT], place[KEY_HEAD] * group + number, scale, lane, gate, bias,
                sigmoid, double,
            )  # fmt: skip
            if number < group - 1:
                T.barrier_arrive(bars.used[r % 2])
        last = (place[HEADS] + group - 1) % 2
        T.barrier_wait(bars.staged, place[DONE] % 2)
        store_columns(m, dq, dk, last, place[BATCH], place[AT], place[LIVE], place[KEY_HEAD], lane)
        T.barrier_arrive(bars.stored)
        T.barrier_arrive(bars.used[last])

    @T.macro
    def mend(dv, m, bars, place, thread):
        for g in rolled_loop(group):
            r = place[HEADS] + g
            T.barrier_wait(bars.tokens[r % 2], r // 2 % 2)
            mend_weak(
                m, dv, r % 2, place[BATCH], place[AT], place[LIVE], place[KEY_HEAD] * group + g,
                thread,
            )  # fmt: skip
            T.barrier_arrive(bars.told[r % 2])
            T.barrier_arrive(bars.free[r % 2])

    @T.prim_func
    def gradients_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        g: T.Tensor((B, L, HV), gates),
        A_log: T.Tensor((HV,), "float32"), dt_bias: T.Tensor((HV,), "float32"),
        do: T.Tensor((B, L, HV, V), dtype), factors: T.Tensor((slots, HV, 2, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"),
        given: T.Tensor((slots, HV, V // ROWS, C), "float32"),
        U: T.Tensor((slots, HV, V, C), dtype), S: T.Tensor((slots, HV, V, K), dtype),
        dS: T.Tensor((slots, HV, V, K), dtype), spans: T.Tensor((rows, 2), "int32"),
        dq: T.Tensor((B, L, H, K), dtype), dk: T.Tensor((B, L, H, K), dtype),
        dv: T.Tensor((B, L, HV, V), dtype), dg: T.Tensor((B, L, HV), gates),
        dbeta: T.Tensor((B, L, HV), strengths), dA_log: T.Tensor((partial, HV), "float32"),
        ddt_bias: T.Tensor((partial, HV), "float32"), scale: T.float32, programs: T.int32,
    ):  # fmt: skip
        with T.Kernel(programs, threads=(128, blocks + 2), prelude=PRELUDE) as first:
            place = T.alloc_local((7,), "int32")  # kept, so that no access divides again
            place[DONE] = 0
            place[HEADS] = 0
            m = Memory(K, V, dtype, l2)
            bars = Barriers(columns)
            tx, role = T.get_thread_binding(0), T.get_thread_binding(1)
            mine = (spans, place, first, programs)
            if role < blocks:
                T.set_max_nreg(registers[0], 1)
                c = Columns(dtype)
                each_chunk(*mine, take_columns, c, m, bars, role, place, scale, tx)
            elif role == blocks:
                T.set_max_nreg(registers[1], 1)
                p = Pairs(dtype)
                each_chunk(*mine, take_pairs, p, m, bars, place, scale, tx)
            else:
                T.set_max_nreg(registers[2], 0)
                if tx < 32:
                    read = (q, k, do, dv, factors, norms, given, U, S, dS)
                    each_chunk(*mine, load, *read, m, bars, place)
                elif tx < 64:
                    gated = (dq, dk, g, A_log, dt_bias, dg, dbeta, dA_log, ddt_bias)
                    each_chunk(*mine, finish, *gated, m, bars, place, scale, tx - 32)
                else:
                    each_chunk(*mine, mend, dv, m, bars, place, tx - 64)

    return gradients_kernel
