"""`reverse_scan.py`: what its warpgroups compute for a chunk. The equations are there."""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragment_sums import put_row
from ..tile.fragments import load_transposed, store, store_transposed
from ..tile.gate_math import stored_R_scale
from ..tile.largest import largest, power_of_two, reciprocal_power
from ..tile.layout import KS_FACTOR, LOG2_E, QS_FACTOR, ROWS, S_FACTOR, U_FACTOR, token_rows
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end
from .factors import Factor

P_WARPGROUP = 1
"""Named barrier of the P warpgroup."""
LEAST_SCALE = 2.0**-60
"""Where all scales of rows are smaller, float16 loses digits that no gradient shows."""


class ReverseScanFragments:
    """Registers of the consumer warpgroup. *_half: the same in the dtype of q, as an operand."""

    def __init__(self, K: int, dtype: str) -> None:
        self.dS = T.alloc_fragment((ROWS, K), "float32")  # dS^T [64, K]
        self.dS_half = T.alloc_fragment((ROWS, K), dtype)
        # the others are transposes too, [64, C]; dO_scaled: scale e^G rq * dO
        self.dO, self.dO_scaled, self.dU_half, self.R_half, self.v = (
            T.alloc_fragment((ROWS, C), dtype) for _ in range(5)
        )
        self.dU, self.KdS, self.R = (T.alloc_fragment((ROWS, C), "float32") for _ in range(3))
        self.e_gamma = T.alloc_local((1,), "float32")


@T.macro
def bring_down(smem: Any, s: Any, i: Any, norm: Any) -> None:
    """Divide the factors of dO and R by the power of two at or below norm; keep both powers."""
    smem.dO_factor[s, i] *= reciprocal_power(norm)
    smem.R_factor[s, i] *= reciprocal_power(norm)
    if i == 0:
        smem.up_down[s, 0] = reciprocal_power(norm)
        smem.up_down[s, 1] = power_of_two(norm)


@T.macro
def compute_factors(smem: Any, s: Any, i: Any, live: Any, scale: Any) -> None:
    """Compute the factors of token i of the chunk in stage s. In float16, if those of R and dO
    are small, the largest is brought to about 1: raw rows of large norms would leave few digits."""
    smem.G2[s, i] = smem.factors[s, Factor.G, i] * LOG2_E
    e_G = T.exp2(smem.G2[s, i])
    rk = smem.factors[s, Factor.RK, i]
    smem.P_factor[s, i] = scale * smem.factors[s, Factor.RQ, i]
    smem.KdS_factor[s, i] = rk * T.exp2(smem.factors[s, Factor.G, C - 1] * LOG2_E - smem.G2[s, i])
    smem.dO_factor[s, i] = smem.P_factor[s, i] * e_G
    smem.R_factor[s, i] = -smem.factors[s, Factor.BETA, i] * rk * e_G
    smem.R_scale[s, i] = stored_R_scale(smem.factors[s, Factor.BETA, i])
    if smem.up_down is not None:
        norm = T.alloc_var("float32")
        norm = T.max(
            largest(T.address_of(smem.factors[s, Factor.RK, 0]), live),
            T.abs(scale) * largest(T.address_of(smem.factors[s, Factor.RQ, 0]), live),
        )
        norm = T.min(norm, 1.0)
        bring_down(smem, s, i, norm)


@T.macro
def compute_channel_factors(smem: Any, s: Any, i: Any) -> None:
    """The same with a decay per channel, where all of them are scales of rows."""
    beta = smem.factors[s, token_rows(smem.q.shape[2])[0], i]
    smem.KdS_factor[s, i] = smem.factors[s, U_FACTOR, i]
    smem.dO_factor[s, i] = smem.factors[s, QS_FACTOR, i]
    smem.R_factor[s, i] = beta * smem.factors[s, KS_FACTOR, i]
    smem.R_scale[s, i] = stored_R_scale(beta)
    if smem.up_down is not None:
        norm = T.alloc_var("float32")
        norm = T.max(
            largest(T.address_of(smem.factors[s, KS_FACTOR, 0])),
            largest(T.address_of(smem.factors[s, QS_FACTOR, 0])),
        )
        norm = T.max(T.min(norm, 1.0), LEAST_SCALE)
        bring_down(smem, s, i, norm)


@T.macro
def prepare_chunk(smem: Any, bars: Any, s: Any, live: Any, parity: Any, thread: Any) -> None:
    """`compute_P` with a decay per channel: P is loaded, and rows of Q_in, K_in and K_out past the
    end are zero."""
    if live < C:
        clear_rows_past_end((smem.do,), s, live)
        fence()
    if thread < C:
        compute_channel_factors(smem, s, thread)
    T.barrier_wait(bars.P_free, parity)


@T.macro
def compute_P(
    smem: Any, P_frag: Any, P_half: Any, bars: Any, s: Any, live: Any, scale: Any, parity: Any,
    thread: Any,
) -> None:  # fmt: skip
    """Compute P and the factors of the chunk in stage s, and clear its rows past the end; by the P
    warpgroup. parity: that of `P_free`'s phase for the chunk before."""
    if live < C:
        clear_rows_past_end((smem.q, smem.k), s, live)
        clear_rows_past_end((smem.do,), s, live)
        fence()
    if thread < C:
        compute_factors(smem, s, thread, live, scale)
    T.sync_threads(P_WARPGROUP, 128)
    T.wgmma_gemm(smem.q[s, :, :], smem.k[s, :, :], P_frag, transpose_B=True, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        P_frag[i, j] *= smem.factors[s, Factor.RK, j] * T.exp2(
            T.if_then_else(i >= j, smem.G2[s, i] - smem.G2[s, j], -T.infinity("float32"))
        )
    for i, j in T.Parallel(C, C):
        P_half[i, j] = smem.P_factor[s, i] * P_frag[i, j]
    T.barrier_wait(bars.P_free, parity)
    T.copy(P_half, smem.P[0, :, :])
    fence()


@T.macro
def scan_step(
    smem: Any, frag: Any, bars: Any, s: Any, parity: Any, thread: Any, outputs: bool,
    channels: bool,
) -> None:  # fmt: skip
    """Stage the outputs and update dS from after to before the chunk in stage s; by the consumer
    warpgroup. parity: that of the phases of `dS_R_free` and `RV_free` for the chunk before."""
    # === K dS, P^T dO, and dS += Q^T (scale e^G rq * dO): three products in flight ===
    T.copy(frag.dS, frag.dS_half)
    T.wgmma_gemm(frag.dS_half, smem.k_out[s, :, :], frag.KdS, transpose_B=True, clear_accum=True)
    T.sync_warp()  # here and below: else ptxas puts what follows between a product's instructions
    load_transposed(smem.do, s, frag.dO, thread)
    T.wgmma_gemm(frag.dO, smem.P[s if channels else 0, :, :], frag.dU, clear_accum=True)
    T.sync_warp()
    frag.e_gamma[0] = 1.0 if channels else T.exp2(smem.factors[s, Factor.G, C - 1] * LOG2_E)
    if smem.up_down is not None:
        frag.e_gamma[0] *= smem.up_down[s, 0]
    if channels:
        multiply_channels(frag, smem, s)
    if not channels or smem.up_down is not None:
        for i, j in T.Parallel(*frag.dS.shape):
            frag.dS[i, j] *= frag.e_gamma[0]
    for i, j in T.Parallel(ROWS, C):
        frag.dO_scaled[i, j] = smem.dO_factor[s, j] * frag.dO[i, j]
    T.wgmma_gemm(frag.dO_scaled, smem.q[s, :, :], frag.dS)
    T.sync_warp()
    if outputs:
        T.barrier_wait(bars.dS_R_free, parity)
        store(frag.dS_half, smem.dS, 0, thread)
    T.wait_wgmma(1)
    T.barrier_arrive(bars.P_free)

    # === dU and R ===
    for i, j in T.Parallel(ROWS, C):
        frag.dU_half[i, j] = frag.dU[i, j] + smem.KdS_factor[s, j] * frag.KdS[i, j]
    T.wgmma_gemm(frag.dU_half, smem.A[s, :, :], frag.R, clear_accum=True)
    T.sync_warp()
    if outputs:
        load_transposed(smem.v, s, frag.v, thread)
    T.wait_wgmma(0)

    # === dS -= K^T (beta e^G rk * R); the outputs R and R * V meanwhile ===
    for i, j in T.Parallel(ROWS, C):
        frag.R_half[i, j] = smem.R_factor[s, j] * frag.R[i, j]
    T.wgmma_gemm(frag.R_half, smem.k[s, :, :], frag.dS)
    T.sync_warp()
    if outputs:
        for i, j in T.Parallel(ROWS, C):
            frag.dU_half[i, j] = smem.R_scale[s, j] * frag.R[i, j]
        store_transposed(frag.dU_half, smem.R, 0, thread, 0)
        for i, j in T.Parallel(ROWS, C):
            frag.R[i, j] *= frag.v[i, j]
        T.barrier_wait(bars.RV_free, parity)
        put_row(frag.R, T.address_of(smem.RV[thread // 4, thread % 4 * 2]))
        fence()
        T.barrier_arrive(bars.outputs_ready)
    T.wait_wgmma(0)
    if smem.up_down is not None:
        multiply_state(frag, smem.up_down[s, 1])


@T.macro
def multiply_channels(frag: Any, smem: Any, s: Any) -> None:
    """Multiply dS by e^gamma, a number a channel."""
    for i, j in T.Parallel(*frag.dS.shape):
        frag.dS[i, j] *= smem.factors[s, S_FACTOR + j // C, j % C]


@T.macro
def multiply_state(frag: Any, factor: Any) -> None:
    """Multiply dS by a number."""
    for i, j in T.Parallel(*frag.dS.shape):
        frag.dS[i, j] *= factor


@T.macro
def add_rounding_residual(smem: Any, frag: Any, s: Any, thread: Any) -> None:
    """Add to dS what the last step lost when it rounded scale e^G rq * dO to the dtype of q.

    If the first token decays strongly, that product is nearly all of the gradient of the initial
    state.

    dO and dO_scaled are computed again: if they lived from the loop to here, they would take 32
    registers in the loop.
    """
    load_transposed(smem.do, s, frag.dO, thread)
    exact = frag.KdS
    for i, j in T.Parallel(ROWS, C):
        exact[i, j] = smem.dO_factor[s, j] * frag.dO[i, j]
    T.copy(exact, frag.dO_scaled)
    for i, j in T.Parallel(ROWS, C):
        frag.dO_scaled[i, j] = exact[i, j] - frag.dO_scaled[i, j]
    if smem.up_down is not None:
        multiply_state(frag, smem.up_down[s, 0])
    T.wgmma_gemm(frag.dO_scaled, smem.q[s, :, :], frag.dS)
    T.wait_wgmma(0)
    if smem.up_down is not None:
        multiply_state(frag, smem.up_down[s, 1])
