"""Forward in one kernel: the intra-chunk work, and the scan.

`intra_chunk.py` and `scan_step.py` have the equations. Nothing but q, k, v, the gates, o, the
states and what backward needs goes through memory.

    reads   q, k [B, L, H, K]; v [B, L, HV, V]; g, beta [B, L, HV]; S_in, the states to start from
    writes  o [B, L, HV, V]; S_out, the final states; for backward (save) `Kept`

Thread block (sequence or piece, and value head; V = 128), alone on an SM. In packed calls whose
sequences are not cut, and in dense ones of many short sequences, there are as many thread blocks as
SMs, and each takes one sequence and head after another (`fused_tasks.py`). The threads:

    128  the intra-chunk warpgroup: A_v of a chunk ahead
    256  two consumer warpgroups: each holds 64 rows of S^T and computes half of P, U, O and S
    32   loading warp: prefetches chunks by TMA into a ring of stages
    32   storing warp: copies o to memory by TMA
    32   gate warp: the factors of a chunk's tokens
    32   norm warp: the norms of q, if they are fused

Pieces are scanned in parallel, twice, as by `scan.py`. The transfer scan has no output, and two
thread blocks for each piece and head: one finds N [pieces, HV, V, K], the state that a piece leaves
of a zero state (the first piece, of the real one), the other M, its effect on any state. Where
nothing of the state before a piece is left after it (`forgetting.py`), M is not computed, and the
scan for N starts at the first chunk that matters.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE
from ..tile.indexing import strided
from ..tile.layout import ROWS
from ..tile.pool import PRELUDE as POOL_PRELUDE
from ..tile.pool import declare_checkpoints, declare_slots, declare_states
from ..tile.pool_kind import PoolKind
from ..tile.proxy_fence import PRELUDE as FENCES
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end
from ..tile.row_scales import PRELUDE as ROW_SCALES
from .block_inverse import LIMIT, choose_parts
from .block_inverse import PRELUDE as INVERSE_PRELUDE
from .block_merges import PRELUDE as MERGES_PRELUDE
from .block_merges import merge
from .checkpoints import PRELUDE as CHECKPOINTS_PRELUDE
from .forgetting import ForgettingSmem, skip_forgotten
from .fused_factors import compute_factors, compute_norms
from .fused_intra_chunk import PRELUDE as INTRA_CHUNK_PRELUDE
from .fused_intra_chunk import (
    STRENGTH,
    apply_key_norms,
    begin_scaled_inverse,
    largest_key_square,
    store_key_square,
)
from .fused_memory import (
    CHUNKS,
    FIELDS,
    LAST,
    NUMBER,
    FusedSmem,
    find_task,
    load_chunks,
    parity_of,
    stage_of,
    store_outputs,
)
from .fused_scan import PRELUDE as SCAN_PRELUDE
from .fused_scan import ScanEnds, begin_turns, consume_chunks
from .fused_tasks import PRELUDE as TASKS_PRELUDE
from .fused_tasks import Tasks, draw_tasks, for_each_task, task_barriers
from .kept import Kept, place_of_norms, store_A
from .list_sequences import COUNT
from .query_norms import PRELUDE as NORMS_PRELUDE
from .scan_step import ScanFragments

PRELUDES = "".join((
    FENCES, PRELUDE, NORMS_PRELUDE, INVERSE_PRELUDE, MERGES_PRELUDE, INTRA_CHUNK_PRELUDE,
    SCAN_PRELUDE, ROW_SCALES, TASKS_PRELUDE,
))  # fmt: skip
REGISTERS = 96, 192, 32
"""Registers a thread: the intra-chunk warpgroup, consumer warpgroups, the other warps."""
REGISTERS_FOR_SCALES = 80, 200, 32
"""The same where consumers keep scales of rows over checkpoints: with 192 they spill most."""


@kernel(own_barriers=True)
def fused_forward(
    *, dtype: str, gates: str, strengths: str, offsets: str, K: int, V: int, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, initial: bool, final: bool, v_first: bool,
    cut: bool, transfer: bool, pool: PoolKind | None = None, ring: bool = False, save: bool = False,
) -> Any:  # fmt: skip
    """Build the kernel. gates, strengths, offsets: dtypes of g, beta and cu_seqlens; initial,
    final: whether S_in is read and S_out written; cut: into pieces; transfer: the transfer scan,
    which must have cut and final; pool: S_in and S_out are a pool, but for the states between
    pieces; ring: whether a thread block takes one whole sequence after another; save: whether to
    keep what backward needs, in the transfer scan M of all pieces."""
    B, L, H, HV, N, M = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N", "M"))
    bounds, entries, slots = (T.dynamic(name) for name in ("bounds", "entries", "slots"))
    output, blocks = not transfer, 1 + transfer
    assert V == 2 * ROWS
    assert not (ring and (cut or transfer))
    listed = pool is not None and pool.apart
    min_parts, max_parts = choose_parts(dtype, l2, sigmoid, double)
    chooses, has_norms, keeps = min_parts < max_parts, l2 and output, save and output
    stages, rows = FusedSmem.STAGES[output], V + K if transfer else V
    ends = ScanEnds(
        initial, final, v_first or (cut and output), v_first or transfer, cut, transfer,
        None if cut and output else pool, pool if output else None,
    )  # fmt: skip
    keeps_scales = ends.has_checkpoints and dtype == "float16"
    registers = REGISTERS_FOR_SCALES if keeps_scales else REGISTERS
    shape_in = (V, K) if ends.v_first_in else (K, V)
    shape_out = (rows, K) if ends.v_first_out else (K, rows)
    preludes = PRELUDES + (POOL_PRELUDE if pool else "")
    preludes += CHECKPOINTS_PRELUDE if ends.has_checkpoints else ""
    declared_slots, pooled = declare_slots(pool), pool is not None
    declared_checkpoints = declare_checkpoints((HV, *((V, K) if v_first else (K, V))), pool)

    @T.macro
    def start_k_kT(M, smem, ready, ragged, left, first, chunk):
        """Start k k^T of a chunk; it is ragged if it has only `left` tokens."""
        s = stage_of(first, chunk, stages)
        T.barrier_wait(ready[s], parity_of(first, chunk, stages))
        if ragged:
            clear_rows_past_end((smem.q, smem.k) if output else (smem.k,), s, left)
            fence()
            T.sync_threads(4, 128)
        T.wgmma_gemm(smem.k[s, :, :], smem.k[s, :, :], M, transpose_B=True, clear_accum=True)

    @T.macro
    def begin_intra_chunk(smem):
        """The blocks of A_v and A above the diagonal, which nobody writes again, are zero."""
        for tiles in smem.inverses:
            for s, i, j in T.Parallel(*tiles.shape):
                tiles[s, i, j] = 0
        T.sync_threads(4, 128)

    @T.macro
    def compute_intra_chunk(
        task, first, smem, ready, tokens_ready, keys_ready, intra_chunk_ready, thread, M, kept
    ):
        """The intra-chunk warpgroup; for `for_each_task`."""
        inv, tokens = smem.inverse, smem.tokens
        warp, lane = thread // 32, thread % 32
        chunks = T.alloc_var("int32")
        chunks = task[CHUNKS]
        two_parts = T.alloc_var("bool")
        ragged = T.alloc_var("int32")
        W = T.alloc_local((16,), "float32")
        ragged = T.if_then_else(task[LAST] < C, chunks - 1, -1)
        own_A = [T.address_of(smem.A[0, 0, 0])] if keeps else []
        if chunks > 0:
            start_k_kT(M, smem, ready, ragged == 0, task[LAST], first, 0)
            T.wait_wgmma(0)
        for chunk in T.serial(chunks):
            s = stage_of(first, chunk, stages)
            T.barrier_wait(tokens_ready[s], parity_of(first, chunk, stages))
            if l2:
                apply_key_norms(M, smem, s, warp, lane, *place_of_norms(task, kept, chunk))
            if output:
                T.barrier_arrive(keys_ready[s])
            if chooses and not l2:
                store_key_square(M, smem.key_squares, warp, lane)
            T.sync_threads(4, 128)
            if keeps and chunk > 0:
                store_A(task, kept, smem, chunk - 1, warp)
            if min_parts == max_parts:
                begin_scaled_inverse(max_parts, M, inv, tokens, s, warp, lane)
            else:
                two_parts = smem.strengths[s] * largest_key_square(smem.key_squares, l2) > LIMIT
                if two_parts:
                    begin_scaled_inverse(2, M, inv, tokens, s, warp, lane)
                else:
                    begin_scaled_inverse(1, M, inv, tokens, s, warp, lane)
            if keeps and warp == 0:
                T.tma_store_wait(0)  # A of the chunk before has left
            T.sync_threads(4, 128)
            following = T.min(chunk + 1, chunks - 1)  # after the last one, for nothing
            # without a ring that is cleared twice: not to do so takes a register, which is spilled
            clears = (chunk + 1 if ring else following) == ragged
            start_k_kT(M, smem, ready, clears, task[LAST], first, following)
            beta = T.address_of(tokens[s, STRENGTH, 0])
            A_v = T.address_of(smem.A_v[s, 0, 0])
            merge(min_parts, inv, beta, A_v, W, warp, lane, dtype, *own_A)
            if min_parts < max_parts:
                T.wait_wgmma(0)  # ptxas serialises products that are in flight over a branch
                if two_parts:  # what was solved in one part is garbage
                    merge(2, inv, beta, A_v, W, warp, lane, dtype, *own_A)
            fence()
            T.barrier_arrive(intra_chunk_ready[s])
            if min_parts == max_parts:
                T.wait_wgmma(0)
        if keeps and chunks > 0:
            T.sync_threads(4, 128)
            store_A(task, kept, smem, chunks - 1, warp)

    @T.prim_func
    def fused_kernel(
        q: strided("q", (B, L, H, K), dtype), k: strided("k", (B, L, H, K), dtype),
        v: strided("v", (B, L, HV, V), dtype), g: strided("g", (B, L, HV), gates),
        beta: strided("beta", (B, L, HV), strengths), A_log: T.Tensor((HV,), "float32"),
        dt_bias: T.Tensor((HV,), "float32"),
        S_in: declare_states("S_in", (N, HV, *shape_in), ends.pool_in),
        cu_seqlens: T.Tensor((bounds,), offsets), o: T.Tensor((B, L, HV, V), dtype),
        S_out: declare_states("S_out", (M, HV, *shape_out), ends.pool_out),
        forgets: T.Tensor((M, HV), "int32"), norms: T.Tensor((slots, H, 2, C), "float32"),
        A_out: T.Tensor((slots, HV, C, C), dtype), state_indices: declared_slots[0],
        fresh: declared_slots[1], checkpoint_offsets: declared_checkpoints[0],
        checkpoint_indices: declared_checkpoints[1], checkpoints: declared_checkpoints[2],
        counter: T.Tensor((entries,), "int32"), null_index: T.int64, sequences: T.int32,
        pieces: T.int32, launched: T.int32, length: T.int32, scale: T.float32,
    ):  # fmt: skip
        """length: tokens of a piece, if sequences are cut; forgets: written by the transfer scan,
        whether a piece does; counter: of tasks, at first 0 (ring and varlen), and what follows it
        in `list_sequences.py` (pool.apart); launched: thread blocks (ring)."""
        grid = launched if ring else pieces * HV * blocks
        with T.Kernel(grid, threads=(128, 4), prelude=preludes) as cta:
            T.annotate_min_blocks_per_sm(1)
            # === shared memory and barriers ===
            ready, v_ready, tokens_ready = (T.alloc_barrier([32] * stages) for _ in range(3))
            norms_ready, v_free = (T.alloc_barrier([32] * stages) for _ in range(2))
            # o_ready: the consumers have read the stage, and o is in v's place
            # intra_chunk_ready: P is there, too, from the consumers
            keys_ready, intra_chunk_ready, o_ready = (
                T.alloc_barrier([n] * stages) for n in (128, 384 if output else 128, 256)
            )
            smem = FusedSmem(K, dtype, max_parts, output, keeps)
            kept = Kept(norms, A_out, HV // H) if keeps else None
            task_ready, task_free = task_barriers(ring, 480 if has_norms else 448)
            tasks = Tasks(FIELDS + 3 * pooled, task_ready, task_free)
            tx, wg = T.get_thread_binding(0), T.get_thread_binding(1)

            # === what the thread block scans ===
            block = cta % blocks  # of a transfer scan: 0 for N, 1 for M
            found = (
                block, cu_seqlens, sequences, L, H, HV, length, varlen, cut, transfer, save,
                state_indices, fresh, null_index, (S_in if transfer else S_out).shape[0], pool,
            )  # fmt: skip
            if not ring:  # noqa: SIM102, known before the kernel is; the next is not
                if T.And(tx == 0, wg == 0):
                    find_task(tasks[0], cta // (HV * blocks), cta // blocks % HV, *found)
            T.sync_threads()
            if transfer:
                skip_forgotten(
                    k, g, beta, A_log, dt_bias, forgets, ForgettingSmem(16), tasks[0], block,
                    wg * 4 + tx // 32, tx % 32, varlen, l2, gate, bias, sigmoid, double,
                )  # fmt: skip

            # === warps ===
            if wg == 0:
                T.set_max_nreg(registers[0], 0)
                M_frag = T.alloc_fragment((C, C), "float32")
                thread = T.alloc_var("int32")
                thread = T.call_extern("int32", "gdn_kept_thread")
                begin_intra_chunk(smem)
                for_each_task(
                    tasks, compute_intra_chunk, smem, ready, tokens_ready, keys_ready,
                    intra_chunk_ready, thread, M_frag, kept,
                )  # fmt: skip
                if keeps and thread < 32:
                    T.tma_store_wait(0)
            elif wg < 3:
                T.set_max_nreg(registers[1], 1)
                before = tasks[0][NUMBER] * length if cut else 0
                if output:
                    begin_turns(wg - 1)
                for_each_task(
                    tasks, consume_chunks, S_in, S_out, smem, ready, keys_ready,
                    intra_chunk_ready, v_ready, o_ready, block, wg - 1, tx,
                    ScanFragments(K, dtype), T.alloc_fragment((C, C // 2), "float32"), V, ends,
                    (checkpoint_offsets, checkpoint_indices, checkpoints, null_index, before),
                )  # fmt: skip
            else:
                T.set_max_nreg(registers[2], 0)
                if tx < 32:
                    drawn = (counter[COUNT] if listed else sequences) * HV
                    draw_tasks(
                        tasks, counter, launched, HV, drawn, cta, tx, varlen, listed, S_in, ends,
                        found, load_chunks, q, k, v, smem, ready, v_ready,
                        o_ready, v_free, block == 0, varlen, output,
                    )  # fmt: skip
                elif tx < 64:
                    for_each_task(
                        tasks, store_outputs, o, smem, o_ready, v_free, tx - 32, varlen, output,
                        pooled,
                    )  # fmt: skip
                elif tx < 96:
                    for_each_task(
                        tasks, compute_factors, g, beta, A_log, dt_bias, smem, norms_ready,
                        tokens_ready, o_ready, scale, tx - 64, varlen, l2, gate, bias, sigmoid,
                        double, output, chooses, kept,
                    )  # fmt: skip
                elif has_norms:
                    for_each_task(tasks, compute_norms, smem, ready, norms_ready)

    return fused_kernel
