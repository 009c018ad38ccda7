"""Stage 1 of forward: all that needs no state, chunk by chunk and value head by value head
(`couple.py`).

Reads q, k, g and beta; writes `matrices` [slots, HV, 2, C, C], P and A_v, and `walk` [slots, HV, 4,
C] in float32, the factors of every token; for backward (SAVE) also `norms`, once a q/k head, and A.

A program takes several, one after another, and loads the next as soon as this one's place is free:
k after its two products, q once P, which takes its place, is on its way to memory. Value heads of a
q/k head follow one another, so that k and the norms are found once.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE, store
from ..tile.gate_math import load_gates, sum_gates
from ..tile.indexing import locate_piece
from ..tile.layout import READ, RK, SCORES, G
from ..tile.ragged_rows import clear_past_end
from .intra_chunk import (
    Memory,
    Registers,
    couple_keys,
    couple_queries,
    factor_keys,
    find_strengths,
    norm_keys,
    norm_queries,
)
from .inverse import (
    begin_first_merge,
    begin_last_merge,
    clear_inverse,
    end_first_merge,
    end_last_merge,
    refine,
    substitute,
)
from .row_norms import PRELUDE as SQUARES_PRELUDE
from .row_norms import sum_squares

SEQUENCE, AT, LIVE, NUMBER, SLOT, BLOCK, LEFT, HEAD, KEY_HEAD = range(9)
"""What is known of a chunk and value head: `locate`'s; the chunk's number, and where it goes; the
block of value heads, how many of those are left, the head, and whose q and k it reads."""
PROGRAMS = {"bfloat16": 4, "float16": 3}
"""How many share a multiprocessor, by its registers and shared memory; `refine` takes more."""


@T.macro
def clear_before_products(x: Any, live: Any) -> None:
    clear_past_end(x, live)
    T.fence_proxy_async()
    T.sync_threads(1, 128)


@kernel(own_barriers=True)
def prepare(
    *, dtype: str, gates: str, strengths: str, offsets: str, K: int, V: int, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, save: bool,
) -> Any:  # fmt: skip
    """See the module."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots, refined = T.dynamic("slots"), dtype == "float16"

    @T.macro
    def find(place, first, span, taken, cu_seqlens, sequences, group):
        """The first value head of a chunk's block; NUMBER and BLOCK are there."""
        place[LEFT] = taken
        place[HEAD] = place[BLOCK] * taken
        place[KEY_HEAD] = place[HEAD] // group
        sequence = place[NUMBER] // span
        place[SLOT] = sequence * T.ceildiv(L, C) + first + place[NUMBER] - sequence * span
        locate_piece(place[SLOT], cu_seqlens, sequences, L, C, place, varlen)

    @T.macro
    def step(place, first, span, taken, cu_seqlens, sequences, blocks, group, programs):
        """On to the next value head, of the program's next block after the last."""
        place[LEFT] -= 1
        place[HEAD] += 1
        if place[LEFT] == 0:
            place[BLOCK] += programs % blocks
            place[NUMBER] += programs // blocks
            if place[BLOCK] >= blocks:
                place[BLOCK] -= blocks
                place[NUMBER] += 1
            find(place, first, span, taken, cu_seqlens, sequences, group)

    @T.macro
    def load_next_gates(g, beta, A_log, dt_bias, place, raw, lane):
        batch = 0 if varlen else place[SEQUENCE]
        load_gates(
            g, beta, A_log, dt_bias, batch, place[HEAD], place[AT], place[LIVE], raw, lane,
            gate, bias,
        )  # fmt: skip

    @T.macro
    def load(x, place, to, full):
        batch = 0 if varlen else place[SEQUENCE]
        T.tma_copy(
            x[batch, place[AT] : place[AT] + C, place[KEY_HEAD], :], to[0, :, :], barrier=full,
            leader_scope_threads=32,
        )  # fmt: skip
        T.barrier_arrive(full)

    @T.prim_func
    def prepare_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        g: T.Tensor((B, L, HV), gates), beta: T.Tensor((B, L, HV), strengths),
        A_log: T.Tensor((HV,), "float32"), dt_bias: T.Tensor((HV,), "float32"),
        cu_seqlens: T.Tensor((N + 1,), offsets), matrices: T.Tensor((slots, HV, 2, C, C), dtype),
        walk: T.Tensor((slots, HV, 4, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"),
        inverses: T.Tensor((slots, HV, C, C), dtype), sequences: T.int32, number: T.int32,
        first: T.int32, span: T.int32, programs: T.int32, taken: T.int32, scale: T.float32,
    ):  # fmt: skip
        """number: how many chunks; span: how many of each sequence, from its chunk `first` on;
        taken: value heads of a q/k head that a program takes at a time."""
        with T.Kernel(programs, threads=128, prelude=PRELUDE + SQUARES_PRELUDE) as program:
            T.annotate_min_blocks_per_sm(PROGRAMS[dtype])
            m, r = Memory(K, dtype), Registers(dtype)
            w = m.inverse
            here, there = (T.alloc_local((9,), "int32") for _ in range(2))
            raw = T.alloc_local((6,), "float32")
            loads = T.alloc_local((1,), "int32")  # of k
            k_full, q_full = T.alloc_barrier(32), T.alloc_barrier(32)
            tx = T.get_thread_binding()
            warp, lane = tx // 32, tx % 32
            blocks = HV // taken
            work = T.ceildiv(number * blocks - program, programs) * taken

            there[NUMBER] = program // blocks
            there[BLOCK] = program % blocks
            find(there, first, span, taken, cu_seqlens, sequences, HV // H)
            loads[0] = 0
            if warp == 0:
                load(k, there, m.k, k_full)
                load(q, there, m.q, q_full)
            if warp == 2:
                load_next_gates(g, beta, A_log, dt_bias, there, raw, lane)
                sum_gates(raw, there[LIVE], m.gates, 0, lane, gate, bias, sigmoid, double)
            clear_inverse(w)
            T.sync_threads(1, 128)
            for n in T.serial(work):
                b = n % 2
                for i in T.unroll(9):
                    here[i] = there[i]
                slot, head, kh, live = here[SLOT], here[HEAD], here[KEY_HEAD], here[LIVE]
                fresh = here[LEFT] == taken  # another k and q than before
                more = n + 1 < work
                step(there, first, span, taken, cu_seqlens, sequences, blocks, HV // H, programs)

                # M, of k alone
                if fresh:
                    T.barrier_wait(k_full, loads[0] % 2)
                    loads[0] += 1
                    if live < C:
                        clear_before_products(m.k, live)
                T.wgmma_gemm(m.k[0, :, :], m.k[0, :, :], r.x, transpose_B=True, clear_accum=True)
                if l2 and fresh:
                    sum_squares(m.k, warp * 16, T.address_of(m.tokens[RK, warp * 16]), lane)
                    T.sync_warp()
                if lane < 16:
                    if fresh:
                        norm_keys(m, norms, slot, kh, warp * 16 + lane, l2, save)
                    factor_keys(m, b, walk, slot, head, warp * 16 + lane, l2)
                T.sync_threads(1, 128)
                if warp == 2 and more:  # not before a product, which would wait for it
                    load_next_gates(g, beta, A_log, dt_bias, there, raw, lane)
                couple_keys(m, r, b, warp)
                if warp == 0:
                    T.tma_store_wait(0)  # A_v of the chunk before has left
                T.sync_threads(1, 128)

                # half the warps: the inverse's diagonal; the others: q's norms, the next gates
                if live < C:
                    T.barrier_wait(q_full, b)
                    clear_before_products(m.q, live)
                if warp < 2:
                    substitute(w, tx)
                else:
                    if l2 and fresh:
                        T.barrier_wait(q_full, b)
                        for half in T.unroll(2):
                            row = (warp - 2) * 32 + half * 16
                            sum_squares(m.q, row, T.address_of(m.tokens[SCORES, row]), lane)
                        T.sync_warp()
                    token = tx - 64
                    if fresh:
                        norm_queries(m, norms, slot, kh, token, scale, l2, save)
                    walk[slot, head, READ, token] = (
                        T.exp2(m.gates[b, G, token]) * m.tokens[SCORES, token]
                    )
                    if warp == 2 and more:
                        sum_gates(
                            raw, there[LIVE], m.gates, b ^ 1, lane, gate, bias, sigmoid, double
                        )
                T.fence_proxy_async()
                T.sync_threads(1, 128)

                # the rest of the inverse, and P in between
                begin_first_merge(w, r.merge)
                T.barrier_wait(q_full, b)
                T.wgmma_gemm(m.q[0, :, :], m.k[0, :, :], r.y, transpose_B=True, clear_accum=True)
                end_first_merge(w, r.merge)
                T.fence_proxy_async()
                T.sync_threads(1, 128)

                if warp == 0 and more and there[LEFT] == taken:
                    load(k, there, m.k, k_full)
                begin_last_merge(w, r.merge)
                couple_queries(m, r, b, warp, tx)
                end_last_merge(w, r.merge)
                T.fence_proxy_async()
                T.sync_threads(1, 128)

                # A_v
                if warp == 0:
                    T.tma_copy(
                        m.P[0, :, 0:C], matrices[slot, head, 0, :, :], leader_scope_threads=32
                    )
                if refined:
                    refine(w, r.x, r.y)
                    T.sync_threads(1, 128)
                if save:
                    for i, j in T.Parallel(C, C):
                        inverses[slot, head, i, j] = T.cast(w.whole[0, i, j], "float32")
                find_strengths(m, r, b, warp, refined)
                T.sync_threads(1, 128)
                store(r.half, m.A_v, 0, tx)
                T.fence_proxy_async()
                if warp == 0:
                    T.tma_store_wait(0)
                    if more:
                        load(q, there, m.q, q_full)
                T.sync_threads(1, 128)
                if warp == 0:
                    T.tma_copy(
                        m.A_v[0, :, :], matrices[slot, head, 1, :, :], leader_scope_threads=32
                    )
            if warp == 0:
                T.tma_store_wait(0)

    return prepare_kernel
