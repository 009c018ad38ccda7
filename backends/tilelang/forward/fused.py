"""Forward in one kernel: the intra-chunk work, and the scan.

`intra_chunk.py` and `scan_step.py` have the equations. Nothing but q, k, v, the gates, o and the
states goes through memory.

    reads   q, k [B, L, H, K]; v [B, L, HV, V]; g, beta [B, L, HV]; S_in, the states to start from
    writes  o [B, L, HV, V]; S_out, the final states

Thread block (sequence and value head; V = 128), alone on an SM; its threads:

    128  the intra-chunk warpgroup: P and A_v of a chunk ahead
    256  two consumer warpgroups: each holds 64 rows of S^T and computes U, O and S
    32   loading warp: prefetches chunks by TMA into a ring of stages
    32   storing warp: copies o to memory by TMA
    32   gate warp: the factors of a chunk's tokens
    32   norm warp: the norms of q, if they are fused
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE
from ..tile.gate_math import load_gates, sum_gates
from ..tile.indexing import SEQUENCE, START, STOP
from ..tile.largest import largest
from ..tile.layout import ROWS
from ..tile.proxy_fence import PRELUDE as FENCES
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end
from ..tile.row_scales import PRELUDE as ROW_SCALES
from .block_inverse import LIMIT, choose_parts, solve_row
from .block_inverse import PRELUDE as INVERSE_PRELUDE
from .fused_intra_chunk import PRELUDE as INTRA_CHUNK_PRELUDE
from .fused_intra_chunk import (
    SQUARES,
    STRENGTH,
    apply_key_norms,
    begin_scaled_inverse,
    compute_query_factors,
    compute_token_factors,
    store_key_squares,
    store_P,
)
from .fused_memory import CHUNKS, HEAD, KEY_HEAD, LAST, STAGES, FusedSmem, find_task
from .fused_scan import PRELUDE as SCAN_PRELUDE
from .fused_scan import finish_chunk, start_chunk
from .query_norms import PRELUDE as NORMS_PRELUDE
from .query_norms import sum_squares
from .row_norms import PRELUDE as ROW_NORMS_PRELUDE
from .scan_memory import store_chunk
from .scan_step import ScanFragments, begin_scan, load_state, stage_output, store_state

PRELUDES = "".join(
    (
        FENCES,
        PRELUDE,
        NORMS_PRELUDE,
        ROW_NORMS_PRELUDE,
        INVERSE_PRELUDE,
        INTRA_CHUNK_PRELUDE,
        SCAN_PRELUDE,
        ROW_SCALES,
    )
)
REGISTERS = 96, 192, 32
"""Registers a thread: the intra-chunk warpgroup, consumer warpgroups, the other warps."""


@kernel(own_barriers=True)
def fused_forward(
    *, dtype: str, gates: str, strengths: str, offsets: str, K: int, V: int, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, initial: bool, final: bool, v_first: bool,
) -> Any:  # fmt: skip
    """Build the kernel. gates, strengths, offsets: dtypes of g, beta and cu_seqlens; initial,
    final: whether S_in is read and S_out written."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    bounds = T.dynamic("bounds")
    assert V == 2 * ROWS
    min_parts, max_parts = choose_parts(dtype, l2, sigmoid, double)
    shape = (V, K) if v_first else (K, V)

    @T.macro
    def consume_chunks(
        S_in, S_out, smem, ready, intra_chunk_ready, v_ready, o_ready, task, wg, thread
    ):
        """A consumer warpgroup: 64 rows of S^T."""
        row = wg * ROWS
        frag = ScanFragments(K, dtype)
        if initial:
            load_state(frag, S_in, task[SEQUENCE], task[HEAD], row, v_first)
        else:
            T.clear(frag.S)
        begin_scan(frag)
        chunks = T.alloc_var("int32")
        chunks = task[CHUNKS]
        for chunk in T.serial(chunks):
            s, parity = chunk % STAGES, chunk // STAGES % 2
            v_tile = s * 2 + wg
            T.barrier_wait(ready[s], parity)
            T.barrier_wait(intra_chunk_ready[s], parity)
            start_chunk(frag, smem, s)
            T.barrier_wait(v_ready[s], parity)
            if chunk == chunks - 1 and task[LAST] < C:  # the rows past the end may hold anything
                clear_rows_past_end((smem.v,), v_tile, task[LAST])
                T.sync_threads(1 + wg, 128)
            finish_chunk(frag, smem, s, v_tile, thread)
            stage_output(frag, smem.v, v_tile, thread)
            fence()
            T.barrier_arrive(o_ready[s])
        if final:
            store_state(frag, S_out, task[SEQUENCE], task[HEAD], row, v_first)

    @T.macro
    def start_k_kT(M, smem, ready, ragged, left, chunk):
        """Start k k^T of a chunk; `ragged` is the one that has only `left` tokens."""
        s = chunk % STAGES
        T.barrier_wait(ready[s], chunk // STAGES % 2)
        if chunk == ragged:
            clear_rows_past_end((smem.q, smem.k), s, left)
            fence()
            T.sync_threads(4, 128)
        T.wgmma_gemm(smem.k[s, :, :], smem.k[s, :, :], M, transpose_B=True, clear_accum=True)

    @T.macro
    def compute_intra_chunk(smem, ready, tokens_ready, intra_chunk_ready, task, thread):
        """The intra-chunk warpgroup."""
        M, P = (T.alloc_fragment((C, C), "float32") for _ in range(2))
        inv, tokens = smem.inverse, smem.tokens
        warp = thread // 32
        for s, i, j in T.Parallel(STAGES, C, C):
            smem.P[s, i, j] = 0
            smem.A_v[s, i, j] = 0
        T.sync_threads(4, 128)
        chunks = T.alloc_var("int32")
        chunks = task[CHUNKS]
        bound, two_parts = T.alloc_var("float32"), T.alloc_var("bool")
        ragged = T.alloc_var("int32")
        ragged = T.if_then_else(task[LAST] < C, chunks - 1, -1)
        if chunks > 0:
            start_k_kT(M, smem, ready, ragged, task[LAST], 0)
            T.wait_wgmma(0)
        for chunk in T.serial(chunks):
            s, buffer = chunk % STAGES, chunk % 2
            T.barrier_wait(tokens_ready[s], chunk // STAGES % 2)
            if l2:
                apply_key_norms(M, smem, s, warp)
                T.sync_threads(4, 128)
            elif min_parts < max_parts:
                store_key_squares(M, smem.key_squares, warp)
                T.sync_threads(4, 128)
            if min_parts == max_parts:
                begin_scaled_inverse(max_parts, M, inv, buffer, tokens, s, warp)
            else:
                bound = largest(T.address_of(tokens[s, STRENGTH, 0]))
                if not l2:
                    bound *= largest(T.address_of(smem.key_squares[0]))
                two_parts = bound > LIMIT
                if two_parts:
                    begin_scaled_inverse(2, M, inv, buffer, tokens, s, warp)
                else:
                    begin_scaled_inverse(1, M, inv, buffer, tokens, s, warp)
            T.wgmma_gemm(smem.k[s, :, :], smem.q[s, :, :], P, transpose_B=True, clear_accum=True)
            T.wait_wgmma(0)
            store_P(P, smem.P, tokens, s, warp)
            T.sync_threads(4, 128)
            start_k_kT(M, smem, ready, ragged, task[LAST], T.min(chunk + 1, chunks - 1))
            beta, A_v = (
                T.address_of(tokens[s, STRENGTH, 0]), T.address_of(smem.A_v[s, 0, 0])
            )  # fmt: skip
            solve_row(min_parts, inv, buffer, beta, A_v, warp, dtype)
            if min_parts < max_parts:
                T.wait_wgmma(0)  # ptxas serialises products that are in flight over a branch
                if two_parts:  # what was solved in one part is garbage
                    solve_row(2, inv, buffer, beta, A_v, warp, dtype)
            fence()
            T.barrier_arrive(intra_chunk_ready[s])
            if min_parts == max_parts:
                T.wait_wgmma(0)

    @T.macro
    def load_chunks(q, k, v, smem, ready, v_ready, o_ready, v_free, task):
        """The loading warp."""
        batch = 0 if varlen else task[SEQUENCE]
        for chunk in T.serial(task[CHUNKS]):
            s, parity, token = chunk % STAGES, chunk // STAGES % 2, task[START] + chunk * C
            T.barrier_wait(o_ready[s], parity ^ 1)
            T.tma_copy(
                k[batch, token : token + C, task[KEY_HEAD], :], smem.k[s, :, :], barrier=ready[s],
                leader_scope_threads=32,
            )  # fmt: skip
            T.tma_copy(
                q[batch, token : token + C, task[KEY_HEAD], :], smem.q[s, :, :], barrier=ready[s],
                leader_scope_threads=32,
            )  # fmt: skip
            T.barrier_arrive(ready[s])
            T.barrier_wait(v_free[s], parity ^ 1)
            for wg in T.unroll(2):
                column = wg * ROWS
                T.tma_copy(
                    v[batch, token : token + C, task[HEAD], column : column + ROWS],
                    smem.v[s * 2 + wg, :, :], barrier=v_ready[s], leader_scope_threads=32,
                )  # fmt: skip
            T.barrier_arrive(v_ready[s])

    @T.macro
    def store_outputs(o, smem, o_ready, v_free, task, lane):
        """The storing warp."""
        batch = 0 if varlen else task[SEQUENCE]
        for chunk in T.serial(task[CHUNKS]):
            s, token = chunk % STAGES, task[START] + chunk * C
            T.barrier_wait(o_ready[s], chunk // STAGES % 2)
            store_chunk(o, smem.v, batch, token, task[STOP], task[HEAD], 0, s, 2, lane)
            T.barrier_arrive(v_free[s])

    @T.macro
    def compute_factors(
        g, beta, A_log, dt_bias, smem, norms_ready, tokens_ready, o_ready, task, scale, lane
    ):
        """The gate warp."""
        raw = T.alloc_local((6,), "float32")
        batch = 0 if varlen else task[SEQUENCE]
        for chunk in T.serial(task[CHUNKS]):
            s, parity = chunk % STAGES, chunk // STAGES % 2
            token, left = task[START] + chunk * C, task[STOP] - task[START] - chunk * C
            load_gates(
                g, beta, A_log, dt_bias, batch, task[HEAD], token, left, raw, lane, gate, bias
            )
            sum_gates(raw, left, smem.gates, 0, lane, gate, bias, sigmoid, double)
            T.sync_warp()
            T.barrier_wait(o_ready[s], parity ^ 1)
            compute_token_factors(smem, s, lane)
            if l2:
                T.barrier_wait(norms_ready[s], parity)
            compute_query_factors(smem, s, scale, lane, l2)
            T.barrier_arrive(tokens_ready[s])
            T.sync_warp()

    @T.macro
    def compute_norms(smem, ready, norms_ready, task):
        """The norm warp."""
        for chunk in T.serial(task[CHUNKS]):
            s = chunk % STAGES
            T.barrier_wait(ready[s], chunk // STAGES % 2)
            sum_squares(smem.q, s, T.address_of(smem.tokens[s, SQUARES, 0]))
            T.barrier_arrive(norms_ready[s])

    @T.prim_func
    def fused_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        v: T.Tensor((B, L, HV, V), dtype), g: T.Tensor((B, L, HV), gates),
        beta: T.Tensor((B, L, HV), strengths), A_log: T.Tensor((HV,), "float32"),
        dt_bias: T.Tensor((HV,), "float32"), S_in: T.Tensor((N, HV, *shape), "float32"),
        cu_seqlens: T.Tensor((bounds,), offsets), o: T.Tensor((B, L, HV, V), dtype),
        S_out: T.Tensor((N, HV, *shape), "float32"), sequences: T.int32, scale: T.float32,
    ):  # fmt: skip
        with T.Kernel(sequences * HV, threads=(128, 4), prelude=PRELUDES) as cta:
            T.annotate_min_blocks_per_sm(1)
            smem = FusedSmem(K, dtype, max_parts)
            task = T.alloc_shared((8,), "int32")
            ready, v_ready, tokens_ready = (T.alloc_barrier([32] * STAGES) for _ in range(3))
            norms_ready, v_free = (T.alloc_barrier([32] * STAGES) for _ in range(2))
            # o_ready: the consumers have read the stage, and o is in v's place
            intra_chunk_ready, o_ready = (
                T.alloc_barrier([128] * STAGES),
                T.alloc_barrier([256] * STAGES),
            )
            tx, wg = T.get_thread_binding(0), T.get_thread_binding(1)
            if T.And(tx == 0, wg == 0):
                find_task(task, cta, cu_seqlens, sequences, L, H, HV, varlen)
            T.sync_threads()
            if wg == 0:
                T.set_max_nreg(REGISTERS[0], 0)
                compute_intra_chunk(smem, ready, tokens_ready, intra_chunk_ready, task, tx)
            elif wg < 3:
                T.set_max_nreg(REGISTERS[1], 1)
                consume_chunks(
                    S_in, S_out, smem, ready, intra_chunk_ready, v_ready, o_ready, task, wg - 1, tx
                )
            else:
                T.set_max_nreg(REGISTERS[2], 0)
                if tx < 32:
                    load_chunks(q, k, v, smem, ready, v_ready, o_ready, v_free, task)
                elif tx < 64:
                    store_outputs(o, smem, o_ready, v_free, task, tx - 32)
                elif tx < 96:
                    compute_factors(
                        g, beta, A_log, dt_bias, smem, norms_ready, tokens_ready, o_ready, task,
                        scale, tx - 64,
                    )  # fmt: skip
                elif l2:
                    compute_norms(smem, ready, norms_ready, task)

    return fused_kernel
