"""Backward, stage 3: the gradient of the state, chunk by chunk from the last to the first.

    P_ij = scale e^{G_i - G_j} rq_i rk_j q_i.k_j    for i >= j, else 0
    dU = P^T dO + e^{gamma - G} rk * (K dS)
    R = A^T dU                                      so that dV = beta * R
    dS <- e^gamma dS + Q^T (scale e^G rq * dO) - K^T (beta e^G rk * R)

Q, K: [C, K], the chunk's rows of q and k; dO, dU, R, V: [C, 64], dS: [K, 64] in a thread block; P,
A: [C, C]; beta, G, rq, rk (1 / norms of q and k): [C]; gamma: the last G. As in
`recompute_states.py`, all but P is computed transposed, and dS^T stays in registers.

With a decay per channel e^gamma scales the rows of dS, P was saved, `decayed_rows` has Q_in, K_in
and K_out in place of scale e^G rq Q, e^G rk K and e^{gamma - G} rk K, and the factors are the
scales of their rows (`forward/prepare_channels.py`).

Reads q, k, v, dO, `G_beta`, `norms`, A and the gradients of the final states. Writes those of the
initial states and, as outputs for `gradients.py`: dS^T after every chunk, in the dtype of q; the
stored R (R times `stored_R_scale`), in the memory of dv; and rowsum(R * V) over each 64 columns.

If forward cut sequences into pieces, this kernel runs twice. The first run starts from dS = 0 at
the end of the chunks that matter before their piece (`forward/first_chunks.py`) and writes no
outputs. `combine_pieces.py` then computes the gradient of the state after each piece, and the
second run starts from these.

Thread block (sequence or piece, value head, 64 columns of V), one on an SM; its threads:

      0..127  consumer warpgroup: holds dS^T, computes R and dS, stages the outputs
    128..255  P warpgroup: computes P and the factors of the tokens, a chunk ahead
    256..287  producer warp: prefetches chunks by TMA, into STAGES stages
    288..319  storing warp: copies dS^T and R to memory by TMA, sums R * V

The thread blocks of a value head form a cluster, whose producer warps keep pace (`pacing.py`).
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragment_sums import PRELUDE as SUMS
from ..tile.fragments import PRELUDE
from ..tile.indexing import Fields, piece_bounds, strided
from ..tile.largest import PRELUDE as LARGEST
from ..tile.layout import ROWS
from ..tile.pacing import ClusterPace, wait_for_cluster
from ..tile.proxy_fence import PRELUDE as FENCES
from .factors import rows_of_factors
from .reverse_scan_memory import Barriers, ReverseScanSmem, load_chunk, stages_of, store_chunk
from .reverse_scan_step import (
    ReverseScanFragments,
    add_rounding_residual,
    compute_P,
    prepare_chunk,
    scan_step,
)

CUDA = FENCES + PRELUDE + SUMS + LARGEST
REGISTERS = (248, 208, 48)
"""Registers a thread: consumer warpgroup, P warpgroup, other warps."""


@kernel(own_barriers=True)
def reverse_scan(
    *, dtype: str, offsets: str, K: int, V: int, group: int,
    varlen: bool, final: bool, initial: bool, v_first: bool, cut: bool, outputs: bool,
    channels: bool, forgetting: bool = False,
) -> Any:  # fmt: skip
    """Build the kernel. group: HV / H; final: whether dS starts from `dS_end`, else from 0;
    initial: whether to write `dS_begin`; v_first: whether these are [V, K]; cut: whether a thread
    block has a piece, else a sequence; outputs: whether to write dS, R and rowsum(R * V); channels:
    a decay per channel; forgetting: there is `matter`, how many chunks do."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots, bounds, M = (T.dynamic(name) for name in ("slots", "bounds", "M"))
    state, blocks = (V, K) if v_first else (K, V), V // ROWS
    STAGES, matrices = stages_of(channels), (2, C, C) if channels else (C, C)

    @T.prim_func
    def reverse_scan_kernel(
        q: strided("q", (B, L, H, K), dtype), k: strided("k", (B, L, H, K), dtype),
        v: strided("v", (B, L, HV, V), dtype), do: T.Tensor((B, L, HV, V), dtype),
        G_beta: T.Tensor((slots, HV, 2, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"), A: T.Tensor((slots, HV, *matrices), dtype),
        decayed_rows: T.Tensor((slots, HV, 3, C, K), dtype),
        factors: T.Tensor((slots, HV, rows_of_factors(K, True), C), "float32"),
        dS_end: T.Tensor((N, HV, *state), "float32"), cu_seqlens: T.Tensor((bounds,), offsets),
        dS_out: T.Tensor((slots, HV, V, K), dtype), R_out: T.Tensor((B, L, HV, V), dtype),
        rowsum_RV: T.Tensor((slots, HV, blocks, C), "float32"),
        dS_begin: T.Tensor((M, HV, *state), "float32"), matter: T.Tensor((M, HV), "int32"),
        scale: T.float32, sequences: T.int32, pieces: T.int32, length: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece, if cut; pieces: their number, else that of sequences."""
        with T.Kernel(
            pieces, HV, blocks, threads=384, cluster_dims=(1, 1, blocks), prelude=CUDA
        ) as (piece, head, block):
            column, key_head = block * ROWS, head // group
            task = Fields("sequence", "start", "stop", "slot")
            piece_bounds(piece, cu_seqlens, sequences, L, length, task.array, varlen, cut)
            batch = 0 if varlen else task.sequence
            start, stop, slot = task.start, task.stop, task.slot
            chunks = T.alloc_var("int32")
            chunks = T.ceildiv(T.max(stop - start, 0), C)  # unused pieces have stop < start
            if forgetting and chunks > 0:
                chunks = matter[piece, head]

            smem = ReverseScanSmem(K, dtype, channels)
            bars = Barriers(STAGES)
            pace = ClusterPace(blocks)
            tx = T.get_thread_binding()

            if tx < 128:
                # === consumer warpgroup ===
                T.set_max_nreg(REGISTERS[0], 1)
                frag = ReverseScanFragments(K, dtype)
                if final:
                    for i, j in T.Parallel(ROWS, K):
                        frag.dS[i, j] = (
                            dS_end[piece, head, column + i, j]
                            if v_first
                            else dS_end[piece, head, j, column + i]
                        )
                else:
                    T.clear(frag.dS)
                for step in T.serial(chunks):
                    s = step % STAGES
                    # The P warpgroup has waited for `inputs_ready`.
                    T.barrier_wait(bars.P_ready, step % 2)
                    scan_step(smem, frag, bars, s, step % 2 ^ 1, tx, outputs, channels)
                    T.barrier_arrive(bars.inputs_free[s])
                if initial:
                    if chunks > 0:
                        add_rounding_residual(smem, frag, (chunks - 1) % STAGES, tx)
                    for i, j in T.Parallel(ROWS, K):
                        if v_first:
                            dS_begin[piece, head, column + i, j] = frag.dS[i, j]
                        else:
                            dS_begin[piece, head, j, column + i] = frag.dS[i, j]
            elif tx < 256:
                # === P warpgroup ===
                T.set_max_nreg(REGISTERS[1], 1)
                P_frag = T.alloc_fragment((C, C), "float32")
                P_half = T.alloc_fragment((C, C), dtype)
                for step in T.serial(chunks):
                    s = step % STAGES
                    T.barrier_wait(bars.inputs_free[s], step // STAGES % 2 ^ 1)
                    T.barrier_wait(bars.inputs_ready[s], step // STAGES % 2)
                    live = stop - (start + (chunks - 1 - step) * C)
                    if channels:
                        prepare_chunk(smem, bars, s, live, step % 2 ^ 1, tx - 128)
                    else:
                        compute_P(
                            smem, P_frag, P_half, bars, s, live, scale, step % 2 ^ 1, tx - 128
                        )
                    T.barrier_arrive(bars.P_ready)
            else:
                T.set_max_nreg(REGISTERS[2], 0)
                if tx < 256 + 32:
                    # === producer warp ===
                    for step in T.serial(chunks):
                        s = step % STAGES
                        T.barrier_wait(bars.inputs_free[s], step // STAGES % 2 ^ 1)
                        wait_for_cluster(pace, step, tx == 256)
                        load_chunk(
                            q, k, v, do, G_beta, norms, A, decayed_rows, factors, smem, bars,
                            batch, start + (chunks - 1 - step) * C, slot + chunks - 1 - step,
                            head, key_head, column, s, outputs, channels,
                        )  # fmt: skip
                elif outputs and tx < 256 + 64:
                    # === storing warp ===
                    for step in T.serial(chunks):
                        chunk = chunks - 1 - step
                        T.barrier_wait(bars.outputs_ready, step % 2)
                        store_chunk(
                            smem, bars, dS_out, R_out, rowsum_RV, batch, start + chunk * C,
                            stop - start - chunk * C, slot + chunk, head, block, tx - 256 - 32,
                        )  # fmt: skip

    return reverse_scan_kernel
