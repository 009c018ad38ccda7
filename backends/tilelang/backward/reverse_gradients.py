"""Backward, stages 3 and 4 in one kernel: the gradient of the state, chunk by chunk from the last
to the first, and all other gradients of each chunk.

The equations are in `reverse_scan.py`, `gradients_inter.py`, `gradients_intra.py` and
`gradients_gates.py`. dS and R do not go through memory, and q, k and dO of a chunk are read once (q
of the first one again in `add_rounding_residual`).

Thread block (sequence or piece, head), one on an SM. Its threads are (128, 4), and threadIdx.y is
the role:

    y = 0, 1   scan warpgroups: dS^T of 64 columns of V each; then 64 columns each of dq and dk
    y = 2      intra-chunk warpgroup: P of the next chunk, and the tiles F and D
    y = 3      x < 32: producer warp, loads by TMA
               x < 64: storing warp, dq and dk by TMA; gradients of gates and beta
               x < 96: dv warp

Dense batches with as many value heads as key heads, K = V = 128.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragment_sums import PRELUDE as SUMS
from ..tile.fragments import PRELUDE
from ..tile.gate_math import remaining_beta
from ..tile.indexing import Fields, piece_bounds, rolled_loop, strided
from ..tile.proxy_fence import PRELUDE as FENCES
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import store_columns
from .factors import Factor
from .gradients_gates import store_gate_gradients
from .gradients_memory import COLUMNS
from .reverse_gradients_intra import IntraFragments, compute_D, compute_F, compute_P
from .reverse_gradients_memory import HALVES, Barriers, ReverseGradientsSmem, load_chunk
from .reverse_gradients_scan import ScanFragments, add_rounding_residual, scan_chunk

CUDA = FENCES + PRELUDE + SUMS
REGISTERS = (176, 120, 40)
"""Registers a thread of the scan warpgroups, the intra-chunk one, the others."""


@T.macro
def store_dv(
    smem: Any, bars: Any, dv: Any, batch: Any, token: Any, stop: Any, head: Any, step: Any,
    lane: Any,
) -> None:  # fmt: skip
    """Turn the stored R into dv = beta R, when all others have read it, and store it; by one
    warp."""
    values = T.alloc_local((8,), dv.dtype)
    T.barrier_wait(bars.R_read, step % 2)
    for n in rolled_loop(8):
        i = n * 8 + lane // 4
        remaining = remaining_beta(smem.factors[step % 2, Factor.BETA, i])
        if remaining != 1.0:
            for half in HALVES:
                for part in (0, 32):
                    for x in T.vectorized(8):
                        values[x] = smem.R[half, i, part + lane % 4 * 8 + x]
                    for x in T.unroll(8):
                        values[x] = remaining * values[x]
                    for x in T.vectorized(8):
                        smem.R[half, i, part + lane % 4 * 8 + x] = values[x]
    T.barrier_arrive(bars.factors_free[step % 2])
    fence()
    T.sync_warp()
    store_columns(dv, smem.R, batch, token, stop, head, 0, 0, 2, lane)
    T.barrier_arrive(bars.R_free)


@kernel(own_barriers=True)
def reverse_gradients(
    *, dtype: str, gates: str, strengths: str, K: int, V: int, final: bool, initial: bool,
    v_first: bool, cut: bool, l2: bool, gate: bool, bias: bool, sigmoid: bool, double: bool,
) -> Any:  # fmt: skip
    """Build the kernel. K, V: 128; final, initial, v_first, cut: see `reverse_scan`;
    gates, strengths: dtypes of g and beta; l2, gate, bias, sigmoid, double: fused options of the
    call."""
    B, L, H, N, M = (T.dynamic(name) for name in ("B", "L", "H", "N", "M"))
    slots, partial = T.dynamic("slots"), T.dynamic("partial")
    state = (V, K) if v_first else (K, V)

    @T.prim_func
    def reverse_gradients_kernel(
        q: strided("q", (B, L, H, K), dtype), k: strided("k", (B, L, H, K), dtype),
        v: strided("v", (B, L, H, V), dtype), g: strided("g", (B, L, H), gates),
        A_log: T.Tensor((H,), "float32"), dt_bias: T.Tensor((H,), "float32"),
        do: T.Tensor((B, L, H, V), dtype), G_beta: T.Tensor((slots, H, 2, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"), A: T.Tensor((slots, H, C, C), dtype),
        U: T.Tensor((slots, H, V, C), dtype), S: T.Tensor((slots, H, V, K), dtype),
        dS_end: T.Tensor((N, H, *state), "float32"),
        dq: T.Tensor((B, L, H, K), dtype), dk: T.Tensor((B, L, H, K), dtype),
        dv: T.Tensor((B, L, H, V), dtype), dg: T.Tensor((B, L, H), gates),
        dbeta: T.Tensor((B, L, H), strengths), dA_log: T.Tensor((partial, H), "float32"),
        ddt_bias: T.Tensor((partial, H), "float32"),
        dS_begin: T.Tensor((M, H, *state), "float32"),
        scale: T.float32, sequences: T.int32, pieces: T.int32, length: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece, if cut; pieces: their number, else that of sequences."""
        with T.Kernel(pieces, H, threads=(128, 4), prelude=CUDA) as (piece, head):
            task = Fields("sequence", "start", "stop", "slot")
            piece_bounds(piece, None, sequences, L, length, task.array, False, cut)
            batch = task.sequence
            start, stop, slot = task.start, task.stop, task.slot
            chunks = T.alloc_var("int32")
            chunks = T.ceildiv(T.max(stop - start, 0), C)

            smem = ReverseGradientsSmem(dtype)
            bars = Barriers()
            tx, role = T.get_thread_binding(0), T.get_thread_binding(1)

            if role < 2:
                # === scan warpgroups ===
                T.set_max_nreg(REGISTERS[0], 1)
                frag = ScanFragments(dtype)
                for h in HALVES:
                    for i, j in T.Parallel(COLUMNS, COLUMNS):
                        if final:
                            frag.dS[h][i, j] = (
                                dS_end[piece, head, role * COLUMNS + i, h * COLUMNS + j]
                                if v_first
                                else dS_end[piece, head, h * COLUMNS + j, role * COLUMNS + i]
                            )
                        else:
                            frag.dS[h][i, j] = 0.0
                for step in T.serial(chunks):
                    scan_chunk(smem, frag, bars, role, step, tx, l2)
                if initial:
                    if chunks > 0:
                        add_rounding_residual(smem, frag, bars, role, chunks, stop - start, tx)
                    for h in HALVES:
                        for i, j in T.Parallel(COLUMNS, COLUMNS):
                            if v_first:
                                dS_begin[piece, head, role * COLUMNS + i, h * COLUMNS + j] = (
                                    frag.dS[h][i, j]
                                )
                            else:
                                dS_begin[piece, head, h * COLUMNS + j, role * COLUMNS + i] = (
                                    frag.dS[h][i, j]
                                )
            elif role == 2:
                # === intra-chunk warpgroup ===
                T.set_max_nreg(REGISTERS[1], 0)
                intra = IntraFragments(dtype)
                if chunks > 0:
                    compute_P(smem, intra, bars, 0, stop - start - (chunks - 1) * C, scale, tx)
                for step in T.serial(chunks):
                    compute_F(smem, intra, bars, step, tx)
                    compute_D(smem, intra, bars, step, tx)
                    if step + 1 < chunks:
                        compute_P(smem, intra, bars, step + 1, C, scale, tx)
            else:
                T.set_max_nreg(REGISTERS[2], 0)
                if tx < 32:
                    # === producer warp ===
                    for step in T.serial(chunks):
                        load_chunk(
                            q, k, v, do, G_beta, norms, A, U, S, smem, bars, batch,
                            start + (chunks - 1 - step) * C, slot + chunks - 1 - step, head, step,
                        )  # fmt: skip
                    if initial:  # noqa: SIM102, known before the kernel is; the next is not
                        if chunks > 0:
                            T.barrier_wait(bars.S_free, chunks % 2 ^ 1)
                            for h in HALVES:
                                columns = slice(h * COLUMNS, (h + 1) * COLUMNS)
                                T.tma_copy(
                                    q[batch, start : start + C, head, columns],
                                    smem.S[h, :, :], barrier=bars.S_ready, leader_scope_threads=32,
                                )  # fmt: skip
                            T.barrier_arrive(bars.S_ready)
                elif tx < 64:
                    # === storing warp ===
                    for step in T.serial(chunks):
                        chunk = chunks - 1 - step
                        s, token = step % 2, start + chunk * C
                        T.barrier_wait(bars.dq_dk_ready[s], step // 2 % 2)
                        for x, to in ((smem.q, dq), (smem.k, dk)):
                            store_columns(to, x, batch, token, stop, head, 0, s, 2, tx - 32)
                        T.barrier_arrive(bars.qk_free[s])
                        store_gate_gradients(
                            smem, g, A_log, dt_bias, dg, dbeta, dA_log, ddt_bias, s, batch, token,
                            stop - token, slot + chunk, head, scale, tx - 32, gate, bias, sigmoid,
                            double,
                        )  # fmt: skip
                        T.barrier_arrive(bars.factors_free[s])
                elif tx < 96:
                    # === dv warp ===
                    for step in T.serial(chunks):
                        token = start + (chunks - 1 - step) * C
                        store_dv(smem, bars, dv, batch, token, stop, head, step, tx - 64)

    return reverse_gradients_kernel
