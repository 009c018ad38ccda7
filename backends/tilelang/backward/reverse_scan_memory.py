"""Shared memory and barriers of `reverse_scan.py`, and its producer and storing warps."""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..tile.layout import K_IN, K_OUT, Q_IN, ROWS
from ..tile.ragged_rows import store_columns
from .factors import Factor, rows_of_factors


def stages_of(channels: bool) -> int:
    """Stages. A decay per channel has 24 KB a stage more: K_out and P."""
    return 2 if channels else 3


class ReverseScanSmem:
    """Shared memory of a thread block."""

    def __init__(self, K: int, dtype: str, channels: bool) -> None:
        STAGES = stages_of(channels)
        # === loaded ===
        self.q, self.k = (T.alloc_shared((STAGES, C, K), dtype) for _ in range(2))
        self.k_out = T.alloc_shared((STAGES, C, K), dtype) if channels else self.k
        self.do, self.v = (T.alloc_shared((STAGES, C, ROWS), dtype) for _ in range(2))
        self.A = T.alloc_shared((STAGES, C, C), dtype)
        self.factors = T.alloc_shared((STAGES, rows_of_factors(K, channels), C), "float32")
        # === computed by the P warpgroup: P, and the factors of rows of P, K dS, dO and R ===
        self.G2 = T.alloc_shared((STAGES, C), "float32")  # G log2(e)
        self.P_factor = T.alloc_shared((STAGES, C), "float32")  # scale rq
        self.KdS_factor = T.alloc_shared((STAGES, C), "float32")  # e^{gamma - G} rk
        self.dO_factor = T.alloc_shared((STAGES, C), "float32")  # scale e^G rq
        self.R_factor = T.alloc_shared((STAGES, C), "float32")  # -beta e^G rk
        self.R_scale = T.alloc_shared((STAGES, C), "float32")  # the stored R is R_scale * R
        # float16: what R_factor and dO_factor are multiplied by, a power of two, and its reciprocal
        self.up_down = T.alloc_shared((STAGES, 2), "float32") if dtype == "float16" else None
        self.P = T.alloc_shared((STAGES if channels else 1, C, C), dtype)  # or loaded
        # === staged for the storing warp ===
        self.dS = T.alloc_shared((1, ROWS, K), dtype)  # dS^T [64, K]
        self.R = T.alloc_shared((1, C, ROWS), dtype)
        # R^T * V^T [64, C] with pairs of rows summed; padded: rows are eight banks apart
        self.RV = T.alloc_shared((ROWS // 2, C + 8), "float32")
        T.annotate_layout({x: make_full_bank_swizzled_layout(x) for x in (self.do, self.v, self.R)})


class Barriers:
    """Barriers, with the number of threads that arrive. [STAGES]: one a stage."""

    def __init__(self, STAGES: int) -> None:
        self.inputs_ready = T.alloc_barrier([32] * STAGES)
        self.inputs_free = T.alloc_barrier([128] * STAGES)
        self.P_ready = T.alloc_barrier(128)  # P and the factors
        self.P_free = T.alloc_barrier(128)
        self.outputs_ready = T.alloc_barrier(128)  # dS, R and RV are staged
        self.dS_R_free = T.alloc_barrier(32)  # dS and R are in memory
        self.RV_free = T.alloc_barrier(32)  # RV has been summed


@T.macro
def load_chunk(
    q: Any, k: Any, v: Any, do: Any, G_beta: Any, norms: Any, A: Any, decayed_rows: Any,
    factors: Any, smem: Any, bars: Any, batch: Any, token: Any, slot: Any, head: Any, key_head: Any,
    column: Any, s: Any, outputs: bool, channels: bool,
) -> None:  # fmt: skip
    """Load a chunk, whose first token is `token`, to stage s; by one warp. Only the outputs need
    v."""
    if channels:
        for source, target in (
            (decayed_rows[slot, head, Q_IN, :, :], smem.q[s, :, :]),
            (decayed_rows[slot, head, K_IN, :, :], smem.k[s, :, :]),
            (decayed_rows[slot, head, K_OUT, :, :], smem.k_out[s, :, :]),
            (do[batch, token : token + C, head, column : column + ROWS], smem.do[s, :, :]),
            (A[slot, head, 0, :, :], smem.P[s, :, :]),
            (A[slot, head, 1, :, :], smem.A[s, :, :]),
            (factors[slot, head, :, :], smem.factors[s, :, :]),
        ):
            T.tma_copy(source, target, barrier=bars.inputs_ready[s], leader_scope_threads=32)
    else:
        for source, target in (
            (q[batch, token : token + C, key_head, :], smem.q[s, :, :]),
            (k[batch, token : token + C, key_head, :], smem.k[s, :, :]),
            (do[batch, token : token + C, head, column : column + ROWS], smem.do[s, :, :]),
            (A[slot, head, :, :], smem.A[s, :, :]),
            (G_beta[slot, head, :, :], smem.factors[s, Factor.G_BETA, :]),
            (norms[slot, key_head, :, :], smem.factors[s, Factor.NORMS, :]),
        ):
            T.tma_copy(source, target, barrier=bars.inputs_ready[s], leader_scope_threads=32)
    if outputs:
        T.tma_copy(
            v[batch, token : token + C, head, column : column + ROWS], smem.v[s, :, :],
            barrier=bars.inputs_ready[s], leader_scope_threads=32,
        )  # fmt: skip
    T.barrier_arrive(bars.inputs_ready[s])


@T.macro
def store_chunk(
    smem: Any, bars: Any, dS_out: Any, R_out: Any, rowsum_RV: Any, batch: Any, token: Any,
    live: Any, slot: Any, head: Any, block: Any, lane: Any,
) -> None:  # fmt: skip
    """Store the staged dS^T and the live rows of R, and sum the rows of R * V; by one warp."""
    column = block * ROWS
    T.tma_copy(
        smem.dS[0, :, :], dS_out[slot, head, column : column + ROWS, :], leader_scope_threads=32
    )
    store_columns(R_out, smem.R, batch, token, token + live, head, column, 0, 1, lane)
    T.barrier_arrive(bars.dS_R_free)

    total = T.alloc_local((2,), "float32")  # two tokens a lane
    T.clear(total)
    for row in T.unroll(ROWS // 2):
        for e in T.vectorized(2):
            total[e] += smem.RV[row, lane * 2 + e]
    for e in T.vectorized(2):
        rowsum_RV[slot, head, block, lane * 2 + e] = total[e]
    T.barrier_arrive(bars.RV_free)
