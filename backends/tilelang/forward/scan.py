"""Forward, stage 2: the scan, which updates the state chunk by chunk and computes the outputs.

`scan_step.py` has the equations of a chunk. A slot is the number of a chunk.

    reads   q, k [B, L, H, K]; v [B, L, HV, V]; P_A_v [slots, HV, 2, C, C] and
            scan_factors [slots, HV, 4, C] from `prepare`; S_in, the states to start from; with a
            decay per channel decayed_rows of `prepare_channels` in place of q and k
    writes  o [B, L, HV, V]; S_out, the final states

Thread block (sequence or piece, value head, 64 W columns of V, with W = 1 or 2); its threads:

    128 W  consumer warpgroups: each holds 64 rows of S^T and computes U, O and S
    32     producer warp: prefetches chunks by TMA into a ring of stages
    32     storing warp: copies o to memory by TMA

Pieces are scanned in parallel, twice. The transfer scan finds the transfer matrices of every piece:
what it leaves of a zero state, N^T, and, with v = 0, of the rows of a unit matrix, M^T, in one
tensor [pieces, HV, V + K, K]. `combine_pieces` then finds the state that each piece starts from,
and the final scan computes o. The transfer scan starts the first piece of a sequence from the real
state, unless the piece forgets it. It skips N of the last piece; only backward needs M of the first
and the last piece. Parts of a rank need all, from zero. Where sequences are cut, two thread blocks
with W = 1 share an SM.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE
from ..tile.indexing import Fields, piece_bounds, piece_number, strided
from ..tile.layout import ROWS, factor_rows
from ..tile.pool import PRELUDE as POOL_PRELUDE
from ..tile.pool import SKIPPED, declare_checkpoints, declare_slots, declare_states, find_slot
from ..tile.pool_kind import PoolKind
from ..tile.proxy_fence import PRELUDE as FENCES
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end, clear_tokens, store_columns
from ..tile.row_scales import PRELUDE as ROW_SCALES
from .checkpoints import PRELUDE as CHECKPOINTS_PRELUDE
from .checkpoints import scan_to_checkpoints
from .first_chunks import limit_transfer
from .scan_memory import ScanSmem, load_chunk, load_P
from .scan_step import (
    ScanFragments,
    begin_scan,
    compute_KS,
    compute_U,
    keep_rounding_here,
    load_state,
    scan_step,
    set_unit_state,
    stage_output,
    store_state,
)

TASK = (
    "sequence", "start", "stop", "slot", "piece", "head", "key_head", "number", "last_number",
    "chunks", "forgets",
)  # fmt: skip
"""Fields of what a thread block scans. sequence, start, stop and slot are what `piece_bounds`
writes, number and last_number what `piece_number` writes. piece counts the pieces of all sequences,
chunks is how many the thread block scans; forgets: see `limit_transfer`."""
POOL_TASK = ("pool_slot", "reads", "writes")
"""More of them, with a pool: what `find_slot` writes."""


@kernel(own_barriers=True)
def scan(
    *, dtype: str, offsets: str, K: int, V: int, warpgroups: int, varlen: bool, initial: bool,
    final: bool, v_first: bool, cut: bool, transfer: bool, channels: bool,
    forgetting: bool = False, pool: PoolKind | None = None,
) -> Any:  # fmt: skip
    """Build the kernel. warpgroups: consumer warpgroups, 1 or 2; initial, final: whether S_in is
    read and S_out written; cut: into pieces; transfer: the transfer scan, which must have one
    warpgroup, cut and final; channels: a decay per channel, with `decayed_rows` in place of q and
    k; forgetting: there is `first` of `first_chunks`; pool: S_in and S_out are a pool, but for the
    states between pieces."""
    B, L, H, HV, N, M = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N", "M"))
    slots, bounds = T.dynamic("slots"), T.dynamic("bounds")
    width, consumers, output = ROWS * warpgroups, 128 * warpgroups, not transfer
    registers = (232, 40) if warpgroups == 2 else (224, 32)
    stages = 3
    if warpgroups == 1 and not cut:
        # K = 128: `prepare` of the next segment, which would slow the scan, then does not fit on
        # the same SM
        stages = 4
    elif warpgroups == 1 and output:
        stages = 2
    if channels:  # 16 KB a stage more
        stages = min(stages, 2 if warpgroups == 2 or cut else 3)
    P_stages = 1 if cut or warpgroups > 1 else 2
    rows = V if output else V + K
    blocks = rows // width
    v_first_in, v_first_out = v_first or (cut and output), v_first or transfer
    shape_in = (V, K) if v_first_in else (K, V)
    shape_out = (rows, K) if v_first_out else (K, rows)
    pool_in, pool_out = None if cut and output else pool, pool if output else None
    declared_slots = declare_slots(pool)
    declared_checkpoints = declare_checkpoints((HV, *((V, K) if v_first else (K, V))), pool)
    task_fields = TASK + POOL_TASK if pool else TASK
    pooled, from_pool, to_pool = (x is not None for x in (pool, pool_in, pool_out))
    asked = pool_out is not None and bool(pool_out.offsets)  # for checkpoints
    preludes = FENCES + PRELUDE + ROW_SCALES
    preludes += (POOL_PRELUDE if pool else "") + (CHECKPOINTS_PRELUDE if asked else "")

    @T.macro
    def consume_chunk(chunk, frag, smem, inputs_ready, P_ready, o_ready, start, stop, wg, thread):
        s, token = chunk % stages, start + chunk * C
        v_tile = s * warpgroups + wg
        T.barrier_wait(inputs_ready[s], chunk // stages % 2)
        if token + C > stop:  # the rows past the end may hold anything
            if not channels:
                clear_rows_past_end((smem.k,), s, stop - token)
            clear_rows_past_end((smem.v,), v_tile, stop - token)
            fence()
            T.sync_threads(1 + wg, 128)
        compute_KS(frag, smem, s, v_tile, thread, channels)
        compute_U(frag, smem, s)
        scan_step(frag, smem, s, P_ready, chunk % P_stages, chunk // P_stages % 2, output)
        if output:
            stage_output(frag, smem.v, v_tile, thread)
            fence()
        T.barrier_arrive(o_ready[s])

    @T.macro
    def consume_chunks(
        S_in, S_out, smem, inputs_ready, P_ready, o_ready, task, row, chunks, wg, thread,
        checkpoints,
    ):  # fmt: skip
        """A consumer warpgroup: its rows of S^T start at `row`."""
        # === the state to start from ===
        sequence, start, stop, piece, head = (
            task.sequence, task.start, task.stop, task.piece, task.head
        )  # fmt: skip
        frag = ScanFragments(K, dtype)
        if transfer:
            set_unit_state(frag, T.if_then_else(task.forgets != 0, -ROWS, row - V))
            if row >= V:
                for s, i, j in T.Parallel(stages, C, ROWS):
                    smem.v[s, i, j] = 0
                T.sync_threads(1, 128)
            elif pooled:
                if T.And(task.number == 0, task.reads != 0):
                    load_state(frag, S_in, task.pool_slot, head, row, v_first_in, pooled=True)
            elif initial:  # noqa: SIM102, known before the kernel is; the next is not
                if T.And(task.number == 0, task.forgets == 0):
                    load_state(frag, S_in, sequence, head, row, v_first_in)
        elif from_pool:
            T.clear(frag.S)
            if task.reads != 0:
                load_state(frag, S_in, task.pool_slot, head, row, v_first_in, pooled=True)
            keep_rounding_here(frag)
        elif initial:
            load_state(frag, S_in, piece, head, row, v_first_in)
        else:
            T.clear(frag.S)
        begin_scan(frag)

        # === chunk by chunk ===
        scanned = (frag, smem, inputs_ready, P_ready, o_ready, start, stop, wg, thread)
        if asked:
            scan_to_checkpoints(
                checkpoints, pool_out, sequence, T.if_then_else(chunks > 0, stop - start, 0), frag,
                head, row, v_first_out, consume_chunk, *scanned,
            )  # fmt: skip
        else:
            for chunk in T.serial(chunks):
                consume_chunk(chunk, *scanned)

        # === the final state ===
        if to_pool:
            keep_rounding_here(frag)
            if T.And(task.writes != 0, T.Or(not cut, task.number == task.last_number)):
                store_state(frag, S_out, task.pool_slot, head, row, v_first_out, pooled=True)
        elif final and not (cut and output):
            store_state(frag, S_out, piece, head, row, v_first_out)
        elif final:  # noqa: SIM102
            if task.number == task.last_number:
                store_state(frag, S_out, sequence, head, row, v_first_out)

    @T.macro
    def store_outputs(o, smem, o_ready, stage_free, task, row, chunks, lane):
        """The storing warp."""
        batch, start, stop, head = (
            0 if varlen else task.sequence, task.start, task.stop, task.head
        )  # fmt: skip
        for chunk in T.serial(chunks):
            s, token = chunk % stages, start + chunk * C
            T.barrier_wait(o_ready[s], chunk // stages % 2)
            if output:
                store_columns(o, smem.v, batch, token, stop, head, row, s, warpgroups, lane)
            T.barrier_arrive(stage_free[s])
        if to_pool:  # noqa: SIM102, known before the kernel is; the next is not
            if task.pool_slot == SKIPPED:
                clear_tokens(o, batch, start, stop, head, row, width, lane)

    @T.prim_func
    def scan_kernel(
        q: strided("q", (B, L, H, K), dtype), k: strided("k", (B, L, H, K), dtype),
        v: strided("v", (B, L, HV, V), dtype), P_A_v: T.Tensor((slots, HV, 2, C, C), dtype),
        scan_factors: T.Tensor((slots, HV, factor_rows(K, channels), C), "float32"),
        decayed_rows: T.Tensor((slots, HV, 3, C, K), dtype),
        S_in: declare_states("S_in", (N, HV, *shape_in), pool_in),
        cu_seqlens: T.Tensor((bounds,), offsets), o: T.Tensor((B, L, HV, V), dtype),
        S_out: declare_states("S_out", (M, HV, *shape_out), pool_out),
        first: T.Tensor((M, HV), "int32"),
        state_indices: declared_slots[0], fresh: declared_slots[1],
        checkpoint_offsets: declared_checkpoints[0], checkpoint_indices: declared_checkpoints[1],
        checkpoints: declared_checkpoints[2], null_index: T.int64, sequences: T.int32,
        pieces: T.int32, length: T.int32, ends: T.int32, skipped: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece; ends: 1 if M of the first and last pieces is wanted, 2 if also
        N of the last. Not cut: length tokens of each sequence after the first `skipped` ones."""
        with T.Kernel(pieces * HV * blocks, threads=consumers + 128, prelude=preludes) as cta:
            T.annotate_min_blocks_per_sm(3 - warpgroups)
            # === what the thread block scans ===
            task = Fields(*task_fields)
            task["piece"] = cta // (HV * blocks)
            task["head"] = cta // blocks % HV
            task["key_head"] = cta // blocks % HV // (HV // H)
            row = cta % blocks * width
            piece_bounds(
                task.piece, cu_seqlens, sequences, L, length, task.array, varlen, cut, pooled
            )
            if not cut:
                task["start"] += skipped
                task["stop"] = T.min(task.stop, task.start + length)
                task["slot"] += skipped // C
            task["chunks"] = T.ceildiv(T.max(task.stop - task.start, 0), C)
            if cut:
                piece_number(cu_seqlens, L, length, task, varlen, pooled)
            if pooled:
                find_slot(
                    task.array, task_fields.index("pool_slot"), state_indices, fresh, null_index,
                    (S_in if from_pool else S_out).shape[0], task.sequence, task.chunks > 0, pool,
                )  # fmt: skip
                if task.pool_slot == SKIPPED:
                    task["chunks"] = 0
            if transfer:
                limit_transfer(task, first, row, V, ends, forgetting)
            chunks = task.chunks

            # === shared memory and barriers ===
            smem = ScanSmem(K, stages, P_stages, warpgroups, dtype, output, channels)
            inputs_ready, P_ready = (T.alloc_barrier([32] * n) for n in (stages, P_stages))
            # o_ready: the consumers have read the stage, and P, and o is in v's place
            o_ready, stage_free = (T.alloc_barrier([n] * stages) for n in (consumers, 32))
            tx = T.get_thread_binding()
            before = task.number * length if cut else 0
            stored = (checkpoint_offsets, checkpoint_indices, checkpoints, null_index, before)

            # === consumer warpgroups ===
            if tx < 128:
                T.set_max_nreg(registers[0], 1)
                consume_chunks(
                    S_in, S_out, smem, inputs_ready, P_ready, o_ready, task, row, chunks, 0, tx,
                    stored,
                )  # fmt: skip
            elif tx < consumers:
                T.set_max_nreg(registers[0], 1)
                consume_chunks(
                    S_in, S_out, smem, inputs_ready, P_ready, o_ready, task, row + ROWS, chunks, 1,
                    tx - 128, stored,
                )  # fmt: skip
            else:
                T.set_max_nreg(registers[1], 0)
                # === producer warp ===
                if tx < consumers + 32:
                    for chunk in T.serial(chunks):
                        s = chunk % stages
                        T.barrier_wait(stage_free[s], chunk // stages % 2 ^ 1)
                        load_chunk(
                            q, k, v, P_A_v, scan_factors, decayed_rows, smem, inputs_ready,
                            0 if varlen else task.sequence, task.start + chunk * C,
                            task.slot + chunk, task.head, task.key_head, row, s, row < V,
                            output, channels,
                        )  # fmt: skip
                        if output:
                            # the chunk that had this stage of P must be done; its number + stages
                            last = chunk + stages - P_stages
                            T.barrier_wait(o_ready[last % stages], last // stages % 2 ^ 1)
                            load_P(
                                P_A_v, smem, P_ready, task.slot + chunk, task.head,
                                chunk % P_stages,
                            )  # fmt: skip
                # === storing warp ===
                elif tx < consumers + 64:
                    store_outputs(
                        o, smem, o_ready, stage_free, task, row, chunks, tx - consumers - 32
                    )

    return scan_kernel
