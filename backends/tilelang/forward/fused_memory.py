"""What a thread block of `fused.py` scans, its shared memory, and the copies of its loading and
storing warps."""

from __future__ import annotations

from typing import Any, ClassVar

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..tile.indexing import SEQUENCE, START, STOP, Fields, piece_bounds, piece_number
from ..tile.layout import ROWS
from ..tile.pool import SKIPPED, find_slot
from ..tile.pool_kind import PoolKind
from ..tile.ragged_rows import clear_tokens, store_columns
from .block_inverse import BlockInverseSmem

HEAD, KEY_HEAD, CHUNKS, LAST, PIECE, NUMBER, LAST_NUMBER, FORGETS = range(4, 12)
"""What a thread block scans, in shared memory, after what `piece_bounds` finds. LAST: live tokens
of the last chunk. NUMBER: of the piece in its sequence, from 0 to LAST_NUMBER. FORGETS: whether
nothing of the state before the piece is left after it (`forgetting.py`)."""
FIELDS = POOL_SLOT = 12
"""How many these are. With a pool there are three more, which `find_slot` writes."""


def stage_of(first: Any, chunk: Any, stages: int) -> Any:
    """The stage of a task's chunk. first: the number of the task's first chunk, unsigned or 0.
    Where TileLang does not see that a stage is not negative, every address costs more."""
    if isinstance(first, int):
        return chunk % stages
    return T.cast((first + T.cast(chunk, "uint32")) % T.uint32(stages), "int32")


def parity_of(first: Any, chunk: Any, stages: int) -> Any:
    """The parity of the barriers of a chunk's stage."""
    if isinstance(first, int):
        return chunk // stages % 2
    number = (first + T.cast(chunk, "uint32")) // T.uint32(stages)
    return T.cast(number % T.uint32(2), "int32")


class FusedSmem:
    """Shared memory: a ring of stages, a chunk each. o takes the place of v. Without output there
    is neither q nor P nor o, and there is space for more stages. parts: of the inverse's operands;
    save: whether A is kept."""

    STAGES: ClassVar = {True: 3, False: 4}

    def __init__(self, K: int, dtype: str, parts: int, output: bool, save: bool) -> None:
        self.stages = stages = self.STAGES[output]
        self.k = T.alloc_shared((stages, C, K), dtype)
        self.v = T.alloc_shared((stages * 2, C, ROWS), dtype)
        self.A_v = T.alloc_shared((stages, C, C), dtype)
        swizzled = [self.v, self.A_v]
        if output:
            self.q = T.alloc_shared((stages, C, K), dtype)
            self.P = T.alloc_shared((stages, C, C), dtype)
            swizzled.append(self.P)
        if save:
            self.A = T.alloc_shared((1, C, C), dtype)
            swizzled.append(self.A)
        self.inverses = [self.A_v, self.A] if save else [self.A_v]
        self.tokens = T.alloc_shared((stages, 8, C), "float32")
        self.scan_factors = T.alloc_shared((stages, 4, C), "float32")
        self.gates = T.alloc_shared((1, 2, C), "float32")
        self.inverse = BlockInverseSmem(parts)
        self.strengths = T.alloc_shared((stages,), "float32")  # a bound of |beta|
        self.key_squares = T.alloc_shared((4,), "float32")  # the largest of a warp's keys
        T.annotate_layout({x: make_full_bank_swizzled_layout(x) for x in swizzled})


@T.macro
def find_task(
    task: Any, piece: Any, head: Any, block: Any, cu_seqlens: Any, sequences: Any, L: Any, H: Any,
    HV: Any, length: Any, varlen: bool, cut: bool, transfer: bool, save: bool, indices: Any,
    fresh: Any, null_index: Any, slots: Any, pool: PoolKind | None,
) -> None:  # fmt: skip
    """Fill `task`; by one thread. block: of a transfer scan, 0 for N and 1 for M; length: tokens of
    a piece, if sequences are cut; save: whether M of the first and last piece is wanted; slots:
    of the pool, if there is one."""
    pooled = pool is not None
    place = Fields("sequence", "start", "stop", "slot", "number", "last_number")
    piece_bounds(piece, cu_seqlens, sequences, L, length, place.array, varlen, cut, pooled)
    for i in T.unroll(4):
        task[i] = place.array[i]
    task[HEAD] = head
    task[KEY_HEAD] = head // (HV // H)
    tokens = T.max(place.stop - place.start, 0)
    task[CHUNKS] = T.ceildiv(tokens, C)
    task[LAST] = tokens - (T.ceildiv(tokens, C) - 1) * C
    task[PIECE] = piece
    task[FORGETS] = 0
    if pooled:
        find_slot(
            task, POOL_SLOT, indices, fresh, null_index, slots, place.sequence, tokens > 0, pool
        )
        if task[POOL_SLOT] == SKIPPED:
            task[CHUNKS] = 0
    if cut:
        piece_number(cu_seqlens, L, length, place, varlen, pooled)
        task[NUMBER] = place.number
        task[LAST_NUMBER] = place.last_number
        if transfer:  # what is not wanted gets no chunks, which costs nothing
            wanted = T.And(task[NUMBER] >= block, task[NUMBER] < task[LAST_NUMBER])
            if save:
                wanted = T.Or(block == 1, wanted)
            task[CHUNKS] = T.if_then_else(wanted, task[CHUNKS], 0)


@T.macro
def load_chunks(
    task: Any, first: Any, q: Any, k: Any, v: Any, smem: Any, ready: Any, v_ready: Any,
    o_ready: Any, v_free: Any, has_values: Any, varlen: bool, output: bool,
) -> None:  # fmt: skip
    """The loading warp; for `draw_tasks`. It loads v only if has_values."""
    batch = 0 if varlen else task[SEQUENCE]
    for chunk in T.serial(task[CHUNKS]):
        s, parity = stage_of(first, chunk, smem.stages), parity_of(first, chunk, smem.stages)
        token = task[START] + chunk * C
        T.barrier_wait(o_ready[s], parity ^ 1)
        T.tma_copy(
            k[batch, token : token + C, task[KEY_HEAD], :], smem.k[s, :, :], barrier=ready[s],
            leader_scope_threads=32,
        )  # fmt: skip
        if output:
            T.tma_copy(
                q[batch, token : token + C, task[KEY_HEAD], :], smem.q[s, :, :], barrier=ready[s],
                leader_scope_threads=32,
            )  # fmt: skip
        T.barrier_arrive(ready[s])
        T.barrier_wait(v_free[s], parity ^ 1)
        if has_values:
            for wg in T.unroll(2):
                column = wg * ROWS
                T.tma_copy(
                    v[batch, token : token + C, task[HEAD], column : column + ROWS],
                    smem.v[s * 2 + wg, :, :], barrier=v_ready[s], leader_scope_threads=32,
                )  # fmt: skip
        T.barrier_arrive(v_ready[s])


@T.macro
def store_outputs(
    task: Any, first: Any, o: Any, smem: Any, o_ready: Any, v_free: Any, lane: Any, varlen: bool,
    output: bool, pooled: bool,
) -> None:  # fmt: skip
    """The storing warp; for `for_each_task`."""
    batch = 0 if varlen else task[SEQUENCE]
    for chunk in T.serial(task[CHUNKS]):
        s, token = stage_of(first, chunk, smem.stages), task[START] + chunk * C
        T.barrier_wait(o_ready[s], parity_of(first, chunk, smem.stages))
        if output:
            store_columns(o, smem.v, batch, token, task[STOP], task[HEAD], 0, s, 2, lane)
        T.barrier_arrive(v_free[s])
    if output and pooled:  # noqa: SIM102, known before the kernel is; the next is not
        if task[POOL_SLOT] == SKIPPED:
            clear_tokens(o, batch, task[START], task[STOP], task[HEAD], 0, 2 * ROWS, lane)
