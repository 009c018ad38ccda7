"""Forward in one kernel: the coupling of each chunk, and the scan.

`intra_chunk.py` and `scan_step.py` have the equations. Nothing but q, k, v, the gates, o and the
states goes through memory.

    reads   q, k [B, L, H, K]; v [B, L, HV, V]; g, beta [B, L, HV]; S_in, the states to start from
    writes  o [B, L, HV, V]; S_out, the final states

Thread block (sequence and value head; V = 128), alone on an SM; its threads:

    256  two consumer warpgroups: each holds 64 rows of S^T and computes U, O and S
    128  the coupling warpgroup: P and A_v of the next chunk
    32   loading warp: prefetches chunks by TMA into a ring of stages
    32   storing warp: copies o to memory by TMA
    32   gate warp: the factors of a chunk's tokens
    32   norm warp: the norms of q and k, if they are fused
"""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE
from ..tile.gate_math import load_gates, sum_gates
from ..tile.indexing import piece_bounds
from ..tile.layout import ROWS
from ..tile.proxy_fence import PRELUDE as FENCES
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end
from .block_inverse import PRELUDE as INVERSE_PRELUDE
from .block_inverse import BlockInverseSmem
from .coupling import CouplingFragments, compute_token_factors, couple
from .fused_scan import PRELUDE as SCAN_PRELUDE
from .fused_scan import finish_chunk, start_chunk
from .row_norms import PRELUDE as NORMS_PRELUDE
from .row_norms import sum_squares
from .scan_memory import store_chunk
from .scan_step import ScanFragments, load_state, stage_output, store_state

STAGES = 3
REGISTERS = 192, 96, 32
"""Registers a thread: consumer warpgroups, the coupling warpgroup, the other warps."""
SEQUENCE, START, STOP, SLOT, HEAD, KEY_HEAD, CHUNKS, LAST = range(8)
"""What a thread block scans, in shared memory; LAST: live tokens of the last chunk."""


class FusedSmem:
    """Shared memory: a ring of stages, a chunk each. o takes the place of v."""

    def __init__(self, K: int, dtype: str) -> None:
        self.q, self.k = (T.alloc_shared((STAGES, C, K), dtype) for _ in range(2))
        self.v = T.alloc_shared((STAGES * 2, C, ROWS), dtype)
        self.P, self.A_v = (T.alloc_shared((STAGES, C, C), dtype) for _ in range(2))
        self.tokens = T.alloc_shared((STAGES, 6, C), "float32")
        self.scan_factors = T.alloc_shared((STAGES, 4, C), "float32")
        self.norms = T.alloc_shared((STAGES, 2, C), "float32")  # sums of squares of q and k
        self.gates = T.alloc_shared((1, 2, C), "float32")
        self.inverse = BlockInverseSmem()
        swizzled = (self.v, self.P, self.A_v)
        T.annotate_layout({x: make_full_bank_swizzled_layout(x) for x in swizzled})


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
    shape = (V, K) if v_first else (K, V)

    @T.macro
    def consume_chunks(S_in, S_out, smem, ready, coupled, v_ready, o_ready, task, row, wg, thread):
        """A consumer warpgroup: its rows of S^T start at `row`."""
        frag = ScanFragments(K, dtype)
        if initial:
            load_state(frag, S_in, task[SEQUENCE], task[HEAD], row, v_first)
        else:
            T.clear(frag.S)
        T.copy(frag.S, frag.S_half)
        chunks = T.alloc_var("int32")
        chunks = task[CHUNKS]
        for chunk in T.serial(chunks):
            s, parity = chunk % STAGES, chunk // STAGES % 2
            v_tile = s * 2 + wg
            T.barrier_wait(ready[s], parity)
            T.barrier_wait(coupled[s], parity)
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
    def couple_chunks(smem, ready, tokens_ready, coupled, task, thread):
        """The coupling warpgroup."""
        frag = CouplingFragments(dtype)
        warp, lane = thread // 32, thread % 32
        for s, i, j in T.Parallel(STAGES, C, C):
            smem.P[s, i, j] = 0
            smem.A_v[s, i, j] = 0
        T.sync_threads(4, 128)
        chunks = T.alloc_var("int32")
        chunks = task[CHUNKS]
        for chunk in T.serial(chunks):
            s, parity = chunk % STAGES, chunk // STAGES % 2
            T.barrier_wait(ready[s], parity)
            if chunk == chunks - 1 and task[LAST] < C:
                clear_rows_past_end((smem.q, smem.k), s, task[LAST])
                fence()
                T.sync_threads(4, 128)
            T.barrier_wait(tokens_ready[s], parity)
            couple(
                frag, smem.inverse, smem.q, smem.k, smem.P, smem.A_v, smem.tokens, s, warp, lane, 4
            )
            fence()
            T.barrier_arrive(coupled[s])

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
            if l2:
                T.barrier_wait(norms_ready[s], parity)
            compute_token_factors(smem, s, left, scale, lane, l2)
            T.barrier_arrive(tokens_ready[s])
            T.sync_warp()

    @T.macro
    def compute_norms(smem, ready, norms_ready, task, lane):
        """The norm warp."""
        for chunk in T.serial(task[CHUNKS]):
            s = chunk % STAGES
            T.barrier_wait(ready[s], chunk // STAGES % 2)
            for x, row in ((smem.q, 0), (smem.k, 1)):
                for part in T.serial(C // 16):
                    sum_squares(x, part * 16, T.address_of(smem.norms[s, row, part * 16]), lane, s)
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
        with T.Kernel(
            sequences * HV,
            threads=512,
            prelude=FENCES + PRELUDE + NORMS_PRELUDE + INVERSE_PRELUDE + SCAN_PRELUDE,
        ) as cta:
            T.annotate_min_blocks_per_sm(1)
            smem = FusedSmem(K, dtype)
            task = T.alloc_shared((8,), "int32")
            ready, v_ready, tokens_ready = (T.alloc_barrier([32] * STAGES) for _ in range(3))
            norms_ready, v_free = (T.alloc_barrier([32] * STAGES) for _ in range(2))
            # o_ready: the consumers have read the stage, and o is in v's place
            coupled, o_ready = T.alloc_barrier([128] * STAGES), T.alloc_barrier([256] * STAGES)
            tx = T.get_thread_binding()
            if tx == 0:
                place = T.alloc_local((4,), "int32")
                piece_bounds(cta // HV, cu_seqlens, sequences, L, L, place, varlen, False)
                for i in T.unroll(4):
                    task[i] = place[i]
                task[HEAD] = cta % HV
                task[KEY_HEAD] = cta % HV // (HV // H)
                tokens = T.max(place[STOP] - place[START], 0)
                task[CHUNKS] = T.ceildiv(tokens, C)
                task[LAST] = tokens - (T.ceildiv(tokens, C) - 1) * C
            T.sync_threads()
            if tx < 128:
                T.set_max_nreg(REGISTERS[0], 1)
                consume_chunks(S_in, S_out, smem, ready, coupled, v_ready, o_ready, task, 0, 0, tx)
            elif tx < 256:
                T.set_max_nreg(REGISTERS[0], 1)
                consume_chunks(
                    S_in, S_out, smem, ready, coupled, v_ready, o_ready, task, ROWS, 1, tx - 128
                )
            elif tx < 384:
                T.set_max_nreg(REGISTERS[1], 0)
                couple_chunks(smem, ready, tokens_ready, coupled, task, tx - 256)
            else:
                T.set_max_nreg(REGISTERS[2], 0)
                if tx < 416:
                    load_chunks(q, k, v, smem, ready, v_ready, o_ready, v_free, task)
                elif tx < 448:
                    store_outputs(o, smem, o_ready, v_free, task, tx - 416)
                elif tx < 480:
                    compute_factors(
                        g, beta, A_log, dt_bias, smem, norms_ready, tokens_ready, o_ready, task,
                        scale, tx - 448,
                    )  # fmt: skip
                elif l2:
                    compute_norms(smem, ready, norms_ready, task, tx - 480)

    return fused_kernel
