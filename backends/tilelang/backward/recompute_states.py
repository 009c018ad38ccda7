"""Backward, stage 2: the states of forward again, and the updates U, chunk by chunk.

    U = A (beta * (V - e^G rk * (K S)))
    S <- e^gamma S + K^T (e^{gamma - G} rk * U)

K: [C, K], the chunk's rows of k; V, U: [C, 64], S: [K, 64] in a thread block; A: [C, C], from
forward; beta, G, rk (1 / norm of k): [C]; gamma: the last G. All of it is computed transposed: S^T
[64, K] and U^T [64, C] are then left operands, which WGMMA reads from registers, and S stays in
registers in float32 for the whole scan.

With a decay per channel e^gamma scales the rows of S, `decayed_rows` has K_in in place of e^G rk K
and K_out in place of e^{gamma - G} rk K, and the factors are the scales of their rows
(`forward/prepare_channels.py`).

Reads k, v, `G_beta`, `norms`, A and the initial states; if forward cut sequences into pieces, the
state before each piece. Writes S^T before every chunk, and U^T, both in the dtype of k; in float16
both over the scales of their rows (`tile/row_scales.py`), and these scales.

Thread block (sequence or piece, value head, 64 columns of V), two on an SM; its threads:

      0..127  consumer warpgroup: holds S^T, computes U and S, stages both in shared memory
    128..159  producer warp: prefetches chunks by TMA, into STAGES stages
    160..191  storing warp: copies the staged S^T and U^T to memory by TMA
    192..255  factor warps: one token a thread, ahead of the consumer warpgroup

The thread blocks of a value head form a cluster, whose producer warps keep pace (`pacing.py`).
"""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE, load_transposed, store
from ..tile.indexing import Fields, piece_bounds, strided
from ..tile.layout import K_IN, K_OUT, KS_FACTOR, LOG2_E, ROWS, S_FACTOR, U_FACTOR, token_rows
from ..tile.pacing import ClusterPace, wait_for_cluster
from ..tile.proxy_fence import PRELUDE as FENCES
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end
from ..tile.row_scales import PRELUDE as ROW_SCALES
from ..tile.row_scales import RowScales, begin_scales, multiply_rows, rescale, store_scales
from .factors import Factor, rows_of_factors

STAGES = 2
CONSUMERS = 1
"""Named barrier of the consumer warpgroup."""
REGISTERS = (224, 32)
"""Registers a thread: consumers, other warps. Two thread blocks then fit on an SM."""


PRELUDES = FENCES + PRELUDE + ROW_SCALES


class StatesSmem:
    """Shared memory of a thread block."""

    def __init__(self, K: int, dtype: str, channels: bool) -> None:
        # === loaded ===
        self.k = T.alloc_shared((STAGES, C, K), dtype)  # or K_in and K_out
        self.k_out = T.alloc_shared((STAGES, C, K), dtype) if channels else self.k
        self.v = T.alloc_shared((STAGES, C, ROWS), dtype)
        self.A = T.alloc_shared((STAGES, C, C), dtype)
        self.factors = T.alloc_shared((STAGES, rows_of_factors(K, channels), C), "float32")
        self.beta_row = token_rows(K)[0] if channels else Factor.BETA
        # === computed: the factors of the rows of K S and of U ===
        self.KS_factor = T.alloc_shared((STAGES, C), "float32")  # -e^G rk
        self.U_factor = T.alloc_shared((STAGES, C), "float32")  # e^{gamma - G} rk
        # === staged for the storing warp ===
        self.S = T.alloc_shared((2, ROWS, K), dtype)  # S^T [64, K] of even and of odd chunks
        self.U = T.alloc_shared((1, ROWS, C), dtype)  # U^T [64, C]


class StatesFragments:
    """Registers of the consumer warpgroup. *_half: the same in the dtype of k, as an operand."""

    def __init__(self, K: int, dtype: str) -> None:
        self.S = T.alloc_fragment((ROWS, K), "float32")  # S^T [64, K]
        self.S_half = T.alloc_fragment((ROWS, K), dtype)
        self.v = T.alloc_fragment((ROWS, C), dtype)  # V^T [64, C]
        self.KS = T.alloc_fragment((ROWS, C), "float32")  # (K S)^T [64, C]
        self.error = T.alloc_fragment((ROWS, C), dtype)  # (beta * (V - e^G rk * (K S)))^T
        self.U = T.alloc_fragment((ROWS, C), "float32")  # U^T [64, C]
        self.U_half = T.alloc_fragment((ROWS, C), dtype)
        self.e_gamma = T.alloc_local((1,), "float32")
        self.rows = RowScales() if dtype == "float16" else None


class Barriers:
    """Barriers, with the number of threads that arrive. [STAGES]: one a stage."""

    def __init__(self) -> None:
        self.inputs_ready = T.alloc_barrier([32] * STAGES)
        self.inputs_free = T.alloc_barrier([128] * STAGES)
        self.factors_ready = T.alloc_barrier([C] * STAGES)
        self.outputs_ready = T.alloc_barrier(128)  # S and U are staged
        self.outputs_free = T.alloc_barrier(32)  # S and U are in memory


@T.macro
def load_chunk(
    k: Any, v: Any, G_beta: Any, norms: Any, A: Any, decayed_rows: Any, factors: Any, smem: Any,
    bars: Any, batch: Any, token: Any, slot: Any, head: Any, key_head: Any, column: Any, s: Any,
    channels: bool,
) -> None:  # fmt: skip
    """Load a chunk, whose first token is `token`, to stage s; by one warp."""
    if channels:
        for source, target in (
            (decayed_rows[slot, head, K_IN, :, :], smem.k[s, :, :]),
            (decayed_rows[slot, head, K_OUT, :, :], smem.k_out[s, :, :]),
            (v[batch, token : token + C, head, column : column + ROWS], smem.v[s, :, :]),
            (A[slot, head, 1, :, :], smem.A[s, :, :]),
            (factors[slot, head, :, :], smem.factors[s, :, :]),
        ):
            T.tma_copy(source, target, barrier=bars.inputs_ready[s], leader_scope_threads=32)
    else:
        for source, target in (
            (k[batch, token : token + C, key_head, :], smem.k[s, :, :]),
            (v[batch, token : token + C, head, column : column + ROWS], smem.v[s, :, :]),
            (A[slot, head, :, :], smem.A[s, :, :]),
            (G_beta[slot, head, :, :], smem.factors[s, Factor.G_BETA, :]),
            (norms[slot, key_head, :, :], smem.factors[s, Factor.NORMS, :]),
        ):
            T.tma_copy(source, target, barrier=bars.inputs_ready[s], leader_scope_threads=32)
    T.barrier_arrive(bars.inputs_ready[s])


@T.macro
def compute_factors(smem: Any, s: Any, i: Any, channels: bool) -> None:
    """Compute the factors of token i of the chunk in stage s."""
    if channels:
        smem.KS_factor[s, i] = smem.factors[s, KS_FACTOR, i]
        smem.U_factor[s, i] = smem.factors[s, U_FACTOR, i]
    else:
        G = smem.factors[s, Factor.G, i] * LOG2_E
        smem.KS_factor[s, i] = -smem.factors[s, Factor.RK, i] * T.exp2(G)
        smem.U_factor[s, i] = smem.factors[s, Factor.RK, i] * T.exp2(
            smem.factors[s, Factor.G, C - 1] * LOG2_E - G
        )


@T.macro
def scan_step(smem: Any, frag: Any, bars: Any, chunk: Any, s: Any, tx: Any, channels: bool) -> None:
    """Stage S^T and U^T of the chunk in stage s, and update S; by the consumer warpgroup."""
    # === K S ===
    T.copy(frag.S, frag.S_half)
    T.wgmma_gemm(frag.S_half, smem.k[s, :, :], frag.KS, transpose_B=True, clear_accum=True)
    T.sync_warp()  # else ptxas puts what follows between the products, which then end later
    if not channels:
        frag.e_gamma[0] = T.exp2(smem.factors[s, Factor.G, C - 1] * LOG2_E)
        for i, j in T.Parallel(*frag.S.shape):
            frag.S[i, j] *= frag.e_gamma[0]
    load_transposed(smem.v, s, frag.v, tx)
    store(frag.S_half, smem.S, chunk % 2, tx)
    T.wait_wgmma(0)
    if channels:
        for i, j in T.Parallel(*frag.S.shape):
            frag.S[i, j] *= smem.factors[s, S_FACTOR + j // C, j % C]

    # === U ===
    v = frag.v
    if frag.rows is not None:
        v = frag.U
        T.copy(frag.v, v)
        multiply_rows(v, frag.rows.reciprocals)
    for i, j in T.Parallel(ROWS, C):
        frag.error[i, j] = smem.factors[s, smem.beta_row, j] * (
            v[i, j] + smem.KS_factor[s, j] * frag.KS[i, j]
        )
    T.wgmma_gemm(frag.error, smem.A[s, :, :], frag.U, transpose_B=True, clear_accum=True)
    T.wait_wgmma(0)
    T.copy(frag.U, frag.U_half)
    # U has one buffer, so the chunk before must be in memory. S has two: no wait before its store.
    T.barrier_wait(bars.outputs_free, chunk % 2 ^ 1)
    store(frag.U_half, smem.U, 0, tx)

    # === S ===
    for i, j in T.Parallel(ROWS, C):
        frag.U_half[i, j] = smem.U_factor[s, j] * frag.U[i, j]
    T.wgmma_gemm(frag.U_half, smem.k_out[s, :, :], frag.S)
    fence()
    T.barrier_arrive(bars.outputs_ready)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.inputs_free[s])


@kernel(own_barriers=True)
def recompute_states(
    *, dtype: str, offsets: str, K: int, V: int, group: int,
    varlen: bool, initial: bool, v_first: bool, cut: bool, channels: bool,
) -> Any:  # fmt: skip
    """Build the kernel. group: HV / H; initial: whether there are first states in `S_begin`, else
    they are 0 and `S_begin` is not read; v_first: whether its states are [V, K]; cut: whether a
    thread block has a piece, else a sequence; channels: a decay per channel."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots, bounds = T.dynamic("slots"), T.dynamic("bounds")
    state, blocks = (N, HV, V, K) if v_first else (N, HV, K, V), V // ROWS
    matrices = (2, C, C) if channels else (C, C)

    @T.prim_func
    def recompute_states_kernel(
        k: strided("k", (B, L, H, K), dtype), v: strided("v", (B, L, HV, V), dtype),
        G_beta: T.Tensor((slots, HV, 2, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"), A: T.Tensor((slots, HV, *matrices), dtype),
        decayed_rows: T.Tensor((slots, HV, 3, C, K), dtype),
        factors: T.Tensor((slots, HV, rows_of_factors(K, True), C), "float32"),
        S_begin: T.Tensor(state, "float32"), cu_seqlens: T.Tensor((bounds,), offsets),
        S_out: T.Tensor((slots, HV, V, K), dtype), U_out: T.Tensor((slots, HV, V, C), dtype),
        row_scales: T.Tensor((slots, HV, blocks, ROWS), "float32"),
        sequences: T.int32, pieces: T.int32, length: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece, if cut; pieces: their number, else that of sequences."""
        with T.Kernel(
            pieces, HV, blocks, threads=256, cluster_dims=(1, 1, blocks), prelude=PRELUDES
        ) as (piece, head, block):
            T.annotate_min_blocks_per_sm(1 if channels and K == 128 else 2)
            column, key_head = block * ROWS, head // group
            task = Fields("sequence", "start", "stop", "slot")
            piece_bounds(piece, cu_seqlens, sequences, L, length, task.array, varlen, cut)
            batch = 0 if varlen else task.sequence
            start, stop, slot = task.start, task.stop, task.slot
            chunks = T.ceildiv(T.max(stop - start, 0), C)  # unused pieces have stop < start

            smem = StatesSmem(K, dtype, channels)
            T.annotate_layout({smem.v: make_full_bank_swizzled_layout(smem.v)})
            bars = Barriers()
            pace = ClusterPace(blocks)
            tx = T.get_thread_binding()

            if tx < 128:
                # === consumer warpgroup ===
                T.set_max_nreg(REGISTERS[0], 1)
                frag = StatesFragments(K, dtype)
                if initial:
                    for i, j in T.Parallel(ROWS, K):
                        frag.S[i, j] = (
                            S_begin[piece, head, column + i, j]
                            if v_first
                            else S_begin[piece, head, j, column + i]
                        )
                else:
                    T.clear(frag.S)
                if frag.rows is not None:
                    begin_scales(frag.rows)
                for chunk in T.serial(chunks):
                    s = chunk % STAGES
                    token = start + chunk * C
                    # The factor warps have waited for `inputs_ready`.
                    T.barrier_wait(bars.factors_ready[s], chunk // STAGES % 2)
                    if token + C > stop:
                        if not channels:
                            clear_rows_past_end((smem.k,), s, stop - token)
                        clear_rows_past_end((smem.v,), s, stop - token)
                        fence()
                        T.sync_threads(CONSUMERS, 128)
                    if frag.rows is not None:
                        rescale(frag.rows, frag.S)
                        store_scales(frag.rows, row_scales, slot + chunk, head, block, tx)
                    scan_step(smem, frag, bars, chunk, s, tx, channels)
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 128 + 32:
                    # === producer warp ===
                    for chunk in T.serial(chunks):
                        s = chunk % STAGES
                        T.barrier_wait(bars.inputs_free[s], chunk // STAGES % 2 ^ 1)
                        wait_for_cluster(pace, chunk, tx == 128)
                        load_chunk(
                            k, v, G_beta, norms, A, decayed_rows, factors, smem, bars, batch,
                            start + chunk * C, slot + chunk, head, key_head, column, s, channels,
                        )  # fmt: skip
                elif tx < 128 + 64:
                    # === storing warp ===
                    for chunk in T.serial(chunks):
                        T.barrier_wait(bars.outputs_ready, chunk % 2)
                        to = slot + chunk, head, slice(column, column + ROWS)
                        T.tma_copy(smem.S[chunk % 2, :, :], S_out[*to, :], leader_scope_threads=32)
                        T.tma_copy(smem.U[0, :, :], U_out[*to, :], leader_scope_threads=32)
                        T.tma_store_wait(0)
                        T.barrier_arrive(bars.outputs_free)
                else:
                    # === factor warps ===
                    for chunk in T.serial(chunks):
                        s = chunk % STAGES
                        T.barrier_wait(bars.inputs_free[s], chunk // STAGES % 2 ^ 1)
                        T.barrier_wait(bars.inputs_ready[s], chunk // STAGES % 2)
                        compute_factors(smem, s, tx - 128 - C, channels)
                        T.barrier_arrive(bars.factors_ready[s])

    return recompute_states_kernel
