"""One chunk of a scan, by one consumer warpgroup that holds 64 rows of the transposed state.

    U = A_v (V - e^G rk * (K S))                  [C, 64]
    O = scale e^G rq * (Q S) + P U                [C, 64]
    S <- e^gamma S + K^T (e^{gamma - G} rk * U)   [K, 64]

With a decay per channel e^gamma scales the rows of S, and smem's q, k and k_out are Q_in, K_in and
K_out (`prepare_channels.py`), whose scales take the place of the other factors.

All products are computed transposed. S^T [64, K] and U^T [64, C] are then left operands, which a
WGMMA can take from registers, so the float32 state stays in registers for the whole scan. In
float16 it is kept over the scales of its rows (`tile/row_scales.py`), and so are K S, U and O.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragments import load_transposed, store_transposed
from ..tile.layout import KS_FACTOR, QS_FACTOR, ROWS, S_FACTOR, U_FACTOR
from ..tile.row_scales import RowScales, begin_scales, multiply_rows, rescale


class ScanFragments:
    """Registers of the warpgroup; everything is transposed."""

    def __init__(self, K: int, dtype: str) -> None:
        self.S = T.alloc_fragment((ROWS, K), "float32")
        self.S_half = T.alloc_fragment((ROWS, K), dtype)  # S before the chunk
        self.KS = T.alloc_fragment((ROWS, C), "float32")
        self.U = T.alloc_fragment((ROWS, C), "float32")
        self.V = T.alloc_fragment((ROWS, C), dtype)
        self.half = T.alloc_fragment((ROWS, C), dtype)  # V - e^G rk K S, then U, then O
        self.scaled_U = T.alloc_fragment((ROWS, C), dtype)  # e^{gamma - G} rk U
        self.O = T.alloc_fragment((ROWS, C), "float32")
        self.rows = RowScales() if dtype == "float16" else None


@T.macro
def load_state(
    frag: Any, S_in: Any, n: Any, head: Any, row: Any, v_first: bool, pooled: bool = False
) -> None:
    """Load 64 columns of V from `row` on of a state [N, HV, K, V] ([N, HV, V, K] if v_first).
    pooled: S_in is a pool, whose slots need not be aligned."""
    if v_first and pooled:
        load = f"gdn_load_state<{frag.S.shape[1]}>"
        T.call_extern("handle", load, T.address_of(S_in[n, head, row, 0]), frag.S.data)
    else:
        for i, j in T.Parallel(*frag.S.shape):
            if v_first:
                frag.S[i, j] = S_in[n, head, row + i, j]
            else:
                frag.S[i, j] = S_in[n, head, j, row + i]


@T.macro
def set_unit_state(frag: Any, row: Any) -> None:
    """Set S^T to 64 rows of a unit matrix [K, K], from `row`, a multiple of 64; to 0 if row < 0."""
    for i, j in T.Parallel(*frag.S.shape):
        frag.S[i, j] = T.if_then_else(row + i == j, 1.0, 0.0)


@T.macro
def begin_scan(frag: Any) -> None:
    """S_half, once S is there; in float16, S over its scales."""
    if frag.rows is not None:
        begin_scales(frag.rows)
        rescale(frag.rows, frag.S)
    T.copy(frag.S, frag.S_half)


@T.macro
def keep_rounding_here(frag: Any) -> None:
    """Between a pool's dtype and float32, S is rounded where the code says so, not beside products:
    nvcc would move it there, and ptxas then serialises them."""
    T.warpgroup_fence_operand(frag.S, num_regs=frag.S.shape[0] * frag.S.shape[1] // 128)


@T.macro
def store_state(
    frag: Any, S_out: Any, n: Any, head: Any, row: Any, v_first: bool, pooled: bool = False,
    keep: bool = False,
) -> None:  # fmt: skip
    """The inverse of `load_state`. keep: the scan goes on with S over its scales."""
    if frag.rows is not None:
        multiply_rows(frag.S, frag.rows.scales)
    if v_first and pooled:
        store = f"gdn_store_state<{frag.S.shape[1]}>"
        T.call_extern("handle", store, T.address_of(S_out[n, head, row, 0]), frag.S.data)
    else:
        for i, j in T.Parallel(*frag.S.shape):
            if v_first:
                S_out[n, head, row + i, j] = frag.S[i, j]
            else:
                S_out[n, head, j, row + i] = frag.S[i, j]
    if keep and frag.rows is not None:
        multiply_rows(frag.S, frag.rows.reciprocals)


@T.macro
def compute_KS(
    frag: Any, smem: Any, s: Any, v_tile: Any, thread: Any, channels: bool = False
) -> None:
    """K S of the chunk in stage s, and e^gamma S. Load V from its tile, which is not read again."""
    T.wgmma_gemm(frag.S_half, smem.k[s, :, :], frag.KS, transpose_B=True, clear_accum=True)
    T.sync_warp()  # else ptxas puts what follows between the products, which then end later
    load_transposed(smem.v, v_tile, frag.V, thread)
    if channels:
        T.wait_wgmma(0)  # beside the product, the factors would not fit in registers
        for i, j in T.Parallel(*frag.S.shape):
            frag.S[i, j] *= smem.scan_factors[s, S_FACTOR + j // C, j % C]
    else:
        for i, j in T.Parallel(*frag.S.shape):
            frag.S[i, j] *= smem.scan_factors[s, S_FACTOR, 0]
        T.wait_wgmma(0)


@T.macro
def compute_U(frag: Any, smem: Any, s: Any) -> None:
    """Start the products for U and Q S."""
    V = frag.V
    if frag.rows is not None:
        V = frag.U
        T.copy(frag.V, V)
        multiply_rows(V, frag.rows.reciprocals)
    for i, j in T.Parallel(ROWS, C):
        frag.half[i, j] = V[i, j] + smem.scan_factors[s, KS_FACTOR, j] * frag.KS[i, j]
    T.wgmma_gemm(frag.half, smem.A_v[s, :, :], frag.U, transpose_B=True, clear_accum=True)
    T.wgmma_gemm(frag.S_half, smem.q[s, :, :], frag.O, transpose_B=True, clear_accum=True)


@T.macro
def scan_step(
    frag: Any, smem: Any, s: Any, P_ready: Any, p: Any, parity: Any, output: bool
) -> None:
    """S after the chunk, and O (output) with P from stage p of P."""
    T.wait_wgmma(1)  # U
    for i, j in T.Parallel(ROWS, C):
        frag.scaled_U[i, j] = frag.U[i, j] * smem.scan_factors[s, U_FACTOR, j]
    T.wgmma_gemm(frag.scaled_U, smem.k_out[s, :, :], frag.S)
    T.copy(frag.U, frag.half)
    T.wait_wgmma(1)  # Q S
    for i, j in T.Parallel(ROWS, C):
        frag.O[i, j] *= smem.scan_factors[s, QS_FACTOR, j]
    if output:
        T.barrier_wait(P_ready[p], parity)
    T.wgmma_gemm(frag.half, smem.P[p, :, :], frag.O, transpose_B=True)
    T.wait_wgmma(1)  # S
    if frag.rows is not None:
        rescale(frag.rows, frag.S)
    T.copy(frag.S, frag.S_half)
    T.wait_wgmma(0)  # O


@T.macro
def stage_output(frag: Any, o: Any, tile: Any, thread: Any) -> None:
    """Store O to o[tile], [C, ROWS] in shared memory."""
    if frag.rows is not None:
        multiply_rows(frag.O, frag.rows.before)
    T.copy(frag.O, frag.half)
    store_transposed(frag.half, o, tile, thread, 0)
