"""Stage 2 of forward, a program a piece, value head and block of V: the state, chunk by chunk.

One or two warpgroups carry 64 rows of the transposed state each (`advance.py`); one warp loads
ahead and one stores, by TMA. Reads q, k, v, `matrices` and `walk` (see `prepare.py`) and the state
that a piece begins with; writes o and the state that it ends with.

A piece is a sequence; or, where sequences are few, they are cut into pieces that are walked at the
same time, twice: first (TRANSFER) for what each leaves of a zero state, and, with v = 0, of the
rows of a unit matrix, which says what it does to any state; then, after `carry.py`, for o, from
the states they really begin with. The first piece of a sequence starts from the real state at once;
the last one, and what the first does to other states, only backward asks for.

Two programs of one warpgroup share a multiprocessor where there are pieces. (The first walk is
written as if it computed an o as well, of whatever is in k's and A_v's place: without, ptxas makes
every product wait for the one before. It leaves out the products that nobody reads.)
"""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE
from ..tile.indexing import piece_bounds, piece_number
from ..tile.layout import ROWS
from ..tile.proxy_fence import PRELUDE as FENCES
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end, store_live_rows
from .scan_step import (
    Tile,
    compute_KS,
    compute_U,
    load_state,
    scan_step,
    stage_output,
    store_state,
    unit_state,
)


class Memory:
    """Shared memory of the chunks on their way, of P fewer; o takes v's place there."""

    def __init__(
        self, K: int, stages: int, ahead: int, warpgroups: int, dtype: str, output: bool
    ) -> None:
        self.k = T.alloc_shared((stages, C, K), dtype)
        self.v = T.alloc_shared((stages * warpgroups, C, ROWS), dtype)
        self.A_v = T.alloc_shared((stages, C, C), dtype)
        self.walk = T.alloc_shared((stages, 4, C), "float32")
        self.q, self.P = self.k, self.A_v
        if output:
            self.q = T.alloc_shared((stages, C, K), dtype)
            self.P = T.alloc_shared((ahead, C, C), dtype)
        T.annotate_layout({self.v: make_full_bank_swizzled_layout(self.v)})


@T.macro
def load_chunk(
    q: Any, k: Any, v: Any, matrices: Any, walk: Any, m: Any, full: Any, batch: Any, at: Any,
    slot: Any, head: Any, kh: Any, first: Any, s: Any, values: Any, output: bool,
) -> None:  # fmt: skip
    """A chunk to stage s, but for P, by one warp; v only where there are values."""
    T.tma_copy(k[batch, at : at + C, kh, :], m.k[s, :, :], barrier=full[s], leader_scope_threads=32)
    if values:
        warpgroups = m.v.shape[0] // m.k.shape[0]
        for wg in T.unroll(warpgroups):
            row = first + wg * ROWS
            T.tma_copy(
                v[batch, at : at + C, head, row : row + ROWS], m.v[s * warpgroups + wg, :, :],
                barrier=full[s], leader_scope_threads=32,
            )  # fmt: skip
    T.tma_copy(
        matrices[slot, head, 1, :, :], m.A_v[s, :, :], barrier=full[s], leader_scope_threads=32
    )
    if output:
        T.tma_copy(
            q[batch, at : at + C, kh, :], m.q[s, :, :], barrier=full[s], leader_scope_threads=32
        )
    T.tma_copy(walk[slot, head, :, :], m.walk[s, :, :], barrier=full[s], leader_scope_threads=32)
    T.barrier_arrive(full[s])


@T.macro
def load_scores(matrices: Any, m: Any, scored: Any, slot: Any, head: Any, p: Any) -> None:
    """A chunk's P to place p, by one warp."""
    T.tma_copy(
        matrices[slot, head, 0, :, :], m.P[p, :, :], barrier=scored[p], leader_scope_threads=32
    )
    T.barrier_arrive(scored[p])


@kernel(own_barriers=True)
def scan(
    *, dtype: str, offsets: str, K: int, V: int, warpgroups: int, varlen: bool, initial: bool,
    final: bool, v_first: bool, cut: bool, transfer: bool,
) -> Any:  # fmt: skip
    """See the module. warpgroups: how many carry a state, 1 or 2; transfer wants 1, cut and
    final."""
    B, L, H, HV, N, M = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N", "M"))
    slots, bounds = T.dynamic("slots"), T.dynamic("bounds")
    width, carriers, output = ROWS * warpgroups, 128 * warpgroups, not transfer
    registers = (232, 40) if warpgroups == 2 else (224, 32)
    stages = 3
    if warpgroups == 1 and not cut:
        stages = 4  # K = 128: `prepare` then finds no place beside a walk, which it would slow down
    elif warpgroups == 1 and output:
        stages = 2
    ahead = 1 if cut or warpgroups > 1 else 2  # chunks whose P is in shared memory
    rows = V if output else V + K
    blocks = rows // width
    begin_first, end_first = v_first or (cut and output), v_first or transfer
    begin_shape = (V, K) if begin_first else (K, V)
    end_shape = (rows, K) if end_first else (K, rows)

    @T.macro
    def carry(begin, end, m, full, scored, done, place, row, chunks, wg, thread):
        sequence, start, stop, piece, head = place[0], place[1], place[2], place[4], place[5]
        t = Tile(K, dtype)
        if transfer:
            unit_state(t, row - V)
            if row >= V:
                for s, i, j in T.Parallel(stages, C, ROWS):
                    m.v[s, i, j] = 0
                T.sync_threads(1, 128)
            elif initial:  # noqa: SIM102, known before the kernel is; the next is not
                if place[7] == 0:
                    load_state(t, begin, sequence, head, row, begin_first)
        elif initial:
            load_state(t, begin, piece, head, row, begin_first)
        else:
            T.clear(t.S)
        T.copy(t.S, t.before)
        for chunk in T.serial(chunks):
            s, at = chunk % stages, start + chunk * C
            values = s * warpgroups + wg
            T.barrier_wait(full[s], chunk // stages % 2)
            if at + C > stop:  # what follows the sequence may be anything
                clear_rows_past_end((m.k,), s, stop - at)
                clear_rows_past_end((m.v,), values, stop - at)
                fence()
                T.sync_threads(1 + wg, 128)
            compute_KS(t, m, s, values, thread)
            compute_U(t, m, s)
            scan_step(t, m, s, scored, chunk % ahead, chunk // ahead % 2, output)
            if output:
                stage_output(t, m.v, values, thread)
                fence()
            T.barrier_arrive(done[s])
        if final and not (cut and output):
            store_state(t, end, piece, head, row, end_first)
        elif final:  # noqa: SIM102
            if place[7] == place[8]:
                store_state(t, end, sequence, head, row, end_first)

    @T.macro
    def store(o, m, done, free, place, row, chunks, lane):
        batch, start, stop, head = 0 if varlen else place[0], place[1], place[2], place[5]
        for chunk in T.serial(chunks):
            s, at = chunk % stages, start + chunk * C
            T.barrier_wait(done[s], chunk // stages % 2)
            if output:
                if at + C <= stop:
                    for wg in T.unroll(warpgroups):
                        first = row + wg * ROWS
                        T.tma_copy(
                            m.v[s * warpgroups + wg, :, :],
                            o[batch, at : at + C, head, first : first + ROWS],
                            leader_scope_threads=32,
                        )
                else:
                    for wg in T.unroll(warpgroups):
                        first, values = row + wg * ROWS, s * warpgroups + wg
                        store_live_rows(m.v, values, o, batch, at, stop - at, head, first, lane)
                T.tma_store_wait(0)
            T.barrier_arrive(free[s])

    @T.prim_func
    def scan_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        v: T.Tensor((B, L, HV, V), dtype), matrices: T.Tensor((slots, HV, 2, C, C), dtype),
        walk: T.Tensor((slots, HV, 4, C), "float32"),
        begin: T.Tensor((N, HV, *begin_shape), "float32"),
        cu_seqlens: T.Tensor((bounds,), offsets), o: T.Tensor((B, L, HV, V), dtype),
        end: T.Tensor((M, HV, *end_shape), "float32"), sequences: T.int32,
        pieces: T.int32, length: T.int32, backward: T.int32, skipped: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece; sequences, pieces: how many; backward: whether what the first
        and the last piece do to a state is wanted too. Not cut: length tokens of each sequence,
        after the skipped ones."""
        with T.Kernel(
            pieces * HV * blocks, threads=carriers + 128, prelude=FENCES + PRELUDE
        ) as program:
            T.annotate_min_blocks_per_sm(3 - warpgroups)
            place = T.alloc_local((10,), "int32")  # kept, so that no access divides again
            place[4] = program // (HV * blocks)
            place[5] = program // blocks % HV
            place[6] = program // blocks % HV // (HV // H)
            first = program % blocks * width
            piece_bounds(place[4], cu_seqlens, sequences, L, length, place, varlen, cut)
            if not cut:
                place[1] += skipped
                place[2] = T.min(place[2], place[1] + length)
                place[3] += skipped // C
            place[9] = T.ceildiv(T.max(place[2] - place[1], 0), C)
            if cut:
                piece_number(cu_seqlens, L, length, place, varlen)
            if transfer:  # a walk of no chunks costs nothing
                within = T.And(place[7] > 0, place[7] < place[8])
                wanted = T.Or(
                    T.And(first < V, place[7] < place[8]),
                    T.And(first >= V, T.Or(within, backward != 0)),
                )
                place[9] = T.if_then_else(wanted, place[9], 0)
            chunks = place[9]
            m = Memory(K, stages, ahead, warpgroups, dtype, output)
            full, scored = (T.alloc_barrier([32] * n) for n in (stages, ahead))
            done, free = (T.alloc_barrier([n] * stages) for n in (carriers, 32))
            tx = T.get_thread_binding()

            if tx < 128:
                T.set_max_nreg(registers[0], 1)
                carry(begin, end, m, full, scored, done, place, first, chunks, 0, tx)
            elif tx < carriers:
                T.set_max_nreg(registers[0], 1)
                carry(begin, end, m, full, scored, done, place, first + ROWS, chunks, 1, tx - 128)
            else:
                T.set_max_nreg(registers[1], 0)
                if tx < carriers + 32:
                    for chunk in T.serial(chunks):
                        s = chunk % stages
                        T.barrier_wait(free[s], chunk // stages % 2 ^ 1)
                        load_chunk(
                            q, k, v, matrices, walk, m, full, 0 if varlen else place[0],
                            place[1] + chunk * C, place[3] + chunk, place[5], place[6], first, s,
                            first < V, output,
                        )  # fmt: skip
                        if output:
                            last = chunk + stages - ahead  # the one that had P's place, + stages
                            T.barrier_wait(done[last % stages], last // stages % 2 ^ 1)
                            load_scores(
                                matrices, m, scored, place[3] + chunk, place[5], chunk % ahead
                            )
                elif tx < carriers + 64:
                    store(o, m, done, free, place, first, chunks, tx - carriers - 32)

    return scan_kernel
