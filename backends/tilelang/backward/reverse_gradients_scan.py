"""`reverse_gradients.py`: what a scan warpgroup computes for a chunk. The equations are in
`reverse_scan.py` and `gradients_inter.py`; here dq and dk are rq and rk times the
gradients of normalised rows, as F and D are."""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragment_sums import sum_columns
from ..tile.fragments import load, load_transposed, store, store_transposed
from ..tile.gate_math import remaining_beta
from ..tile.layout import LOG2_E
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end
from .factors import Factor
from .gradients_inter import sum_blocks, sum_row_dots
from .gradients_memory import COLUMNS, Dot
from .reverse_gradients_intra import multiply_halves
from .reverse_gradients_memory import HALVES

SCANS, OWN = 1, 3
"""Named barriers: of both scan warpgroups, and OWN + w of scan warpgroup w."""


class ScanFragments:
    """Registers of scan warpgroup w: dS^T [64, K] of half w of V, and half w of K of dq and dk."""

    def __init__(self, dtype: str) -> None:
        # transposes, [64 of V, ...]: dS by halves of K
        self.dS = [T.alloc_fragment((COLUMNS, COLUMNS), "float32") for _ in HALVES]
        self.dS_half = [T.alloc_fragment((COLUMNS, COLUMNS), dtype) for _ in HALVES]
        self.dU, self.R = (T.alloc_fragment((COLUMNS, C), "float32") for _ in range(2))
        self.dO, self.dO_scaled, self.dU_half, self.R_half, self.v = (
            T.alloc_fragment((COLUMNS, C), dtype) for _ in range(5)
        )
        # [C, 64 of K]; dq also holds R S^T
        self.dq, self.dk, self.product = (
            T.alloc_fragment((C, COLUMNS), "float32") for _ in range(3)
        )
        self.rows = T.alloc_fragment((C, COLUMNS), dtype)
        self.e_gamma, self.S_dS = (T.alloc_local((1,), "float32") for _ in range(2))


@T.macro
def sum_S_dS(smem: Any, frag: Any, s: Any, w: Any, thread: Any) -> None:
    """Store each warp's share of <S, dS> of half w of V."""
    frag.S_dS[0] = 0.0
    for h in HALVES:
        load(smem.S, h * 2 + w, frag.rows, thread)
        for i, j in T.Parallel(COLUMNS, COLUMNS):
            frag.S_dS[0] += frag.rows[i, j] * frag.dS[h][i, j]
    frag.S_dS[0] = T.warp_reduce_sum(frag.S_dS[0])
    if thread % 32 == 0:
        smem.S_dS[s, w * 4 + thread // 32] = frag.S_dS[0]


@T.macro
def add_rounding_residual(
    smem: Any, frag: Any, bars: Any, w: Any, steps: Any, live: Any, thread: Any
) -> None:
    """See `reverse_scan_step.py`: dS^T += (what dO_scaled lost when it was rounded) Q, for the last
    chunk, whose q is in the memory of S now. steps: how many there were."""
    s = (steps - 1) % 2
    T.barrier_wait(bars.S_ready, steps % 2)
    if live < C:
        clear_rows_past_end((smem.S,), w, live)
        fence()
    T.sync_threads(SCANS, 256)
    load_transposed(smem.do, w, frag.dO, thread)
    for i, j in T.Parallel(COLUMNS, C):
        frag.R[i, j] = smem.dO_factor[s, j] * frag.dO[i, j]
    T.copy(frag.R, frag.dO_scaled)
    for i, j in T.Parallel(COLUMNS, C):
        frag.dO_scaled[i, j] = frag.R[i, j] - frag.dO_scaled[i, j]
    for h in HALVES:
        T.wgmma_gemm(frag.dO_scaled, smem.S[h, :, :], frag.dS[h])
    T.wait_wgmma(0)


@T.macro
def scan_chunk(smem: Any, frag: Any, bars: Any, w: Any, step: Any, thread: Any, l2: bool) -> None:
    """Update dS from after to before the chunk, and stage half w of K of dq and dk."""
    s, parity = step % 2, step % 2
    # === dU = P^T dO + (e^{gamma - G} rk * K dS), and the stored dS ===
    for h in HALVES:
        T.copy(frag.dS[h], frag.dS_half[h])
    T.barrier_wait(bars.P_ready, parity)  # who computed P had waited for q and k
    for h in HALVES:
        T.wgmma_gemm(
            frag.dS_half[h], smem.k[s * 2 + h, :, :], frag.dU, transpose_B=True,
            clear_accum=h == 0,
        )  # fmt: skip
    T.sync_warp()
    for h in HALVES:
        store(frag.dS_half[h], smem.dS, h * 2 + w, thread)
    T.wait_wgmma(0)
    for i, j in T.Parallel(COLUMNS, C):
        frag.dU[i, j] *= smem.KdS_factor[s, j]
    T.barrier_wait(bars.do_ready, parity)
    T.wgmma_gemm(smem.do[w, :, :], smem.P[0, :, :], frag.dU, transpose_A=True)
    T.sync_warp()
    load_transposed(smem.do, w, frag.dO, thread)
    for i, j in T.Parallel(COLUMNS, C):
        frag.dO_scaled[i, j] = smem.dO_factor[s, j] * frag.dO[i, j]
    T.wait_wgmma(0)

    # === R = A^T dU, and dS = e^gamma dS + Q^T (scale e^G rq * dO) ===
    T.copy(frag.dU, frag.dU_half)
    T.barrier_wait(bars.A_ready, parity)
    T.wgmma_gemm(frag.dU_half, smem.A[0, :, :], frag.R, clear_accum=True)
    T.sync_warp()
    T.barrier_wait(bars.S_ready, parity)
    sum_S_dS(smem, frag, s, w, thread)
    frag.e_gamma[0] = T.exp2(smem.factors[s, Factor.G, C - 1] * LOG2_E)
    for h in HALVES:
        for i, j in T.Parallel(COLUMNS, COLUMNS):
            frag.dS[h][i, j] *= frag.e_gamma[0]
    for h in HALVES:
        T.wgmma_gemm(frag.dO_scaled, smem.q[s * 2 + h, :, :], frag.dS[h])
    T.sync_warp()
    T.wait_wgmma(2)

    # === dS -= K^T (beta e^G rk * R); R and R * V meanwhile ===
    for i, j in T.Parallel(COLUMNS, C):
        frag.R_half[i, j] = smem.R_factor[s, j] * frag.R[i, j]
    for h in HALVES:
        T.wgmma_gemm(frag.R_half, smem.k[s * 2 + h, :, :], frag.dS[h])
    T.sync_warp()
    for i, j in T.Parallel(COLUMNS, C):
        frag.dU_half[i, j] = smem.R_scale[s, j] * frag.R[i, j]
    T.barrier_wait(bars.v_ready, parity)
    load_transposed(smem.R, w, frag.v, thread)
    store_transposed(frag.dU_half, smem.R, w, thread, 0)
    T.wait_wgmma(2)  # q has been read, whose place dq takes
    fence()
    T.barrier_arrive(bars.R_ready)
    for i, j in T.Parallel(COLUMNS, C):
        frag.R[i, j] *= frag.v[i, j]
    sum_columns(frag.R, T.address_of(smem.RV[s, w * 4 + thread // 32, 0]))

    # === dq: dO S^T and F K ===
    multiply_halves(smem.do, 0, smem.S, w * 2, frag.dq, False, False)
    T.sync_warp()
    load(smem.q, s * 2 + w, frag.rows, thread)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.do_free)
    sum_row_dots(frag.dq, frag.rows, smem, frag, s, Dot.DO_S, w, thread)
    for i, j in T.Parallel(C, COLUMNS):
        frag.dq[i, j] *= smem.dO_factor[s, i]
    T.barrier_wait(bars.F_ready, parity)
    T.wgmma_gemm(smem.F[0, :, :], smem.k[s * 2 + w, :, :], frag.dq)
    T.sync_warp()
    if l2:
        T.wait_wgmma(0)
        sum_row_dots(frag.dq, frag.rows, smem, frag, s, Dot.DQ, w, thread)

    # === dk: U dS^T and F^T Q ===
    T.barrier_wait(bars.U_ready, parity)
    T.barrier_wait(bars.R_ready, parity)  # and with it dS of the other warpgroup
    multiply_halves(smem.U, 0, smem.dS, w * 2, frag.dk, True, False)
    T.sync_warp()
    load(smem.k, s * 2 + w, frag.rows, thread)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.U_free)
    sum_row_dots(frag.dk, frag.rows, smem, frag, s, Dot.U_DS, w, thread)
    for i, j in T.Parallel(C, COLUMNS):
        frag.dk[i, j] *= smem.KdS_factor[s, i]
    T.wgmma_gemm(smem.F[0, :, :], smem.q[s * 2 + w, :, :], frag.dk, transpose_A=True)
    T.sync_warp()
    if l2:
        load(smem.q, s * 2 + w, frag.rows, thread)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.F_free)
    T.barrier_wait(bars.F_free, parity)  # the other warpgroup has read q, k and dS, and has dots
    if l2:
        apply_norm(frag.rows, frag.dq, smem, s, Factor.RQ, Dot.DQ)
    T.copy(frag.dq, frag.rows)
    store(frag.rows, smem.q, s * 2 + w, thread)

    # === R S^T ===
    multiply_halves(smem.R, 0, smem.S, w * 2, frag.dq, False, False)
    T.sync_warp()
    load(smem.k, s * 2 + w, frag.rows, thread)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.S_free)
    T.barrier_arrive(bars.R_read)

    # === dk of R S^T and D ===
    sum_row_dots(frag.dq, frag.rows, smem, frag, s, Dot.R_S, w, thread)
    for i, j in T.Parallel(C, COLUMNS):
        frag.dk[i, j] += stored_R_factor(smem, s, i) * frag.dq[i, j]
    T.barrier_wait(bars.D_ready, parity)
    T.wgmma_gemm(smem.A[0, :, :], smem.k[s * 2 + w, :, :], frag.dk)
    T.wgmma_gemm(smem.A[0, :, :], smem.k[s * 2 + w, :, :], frag.dk, transpose_A=True)
    T.wait_wgmma(0)
    if l2:
        load(smem.k, s * 2 + w, frag.rows, thread)
        sum_row_dots(frag.dk, frag.rows, smem, frag, s, Dot.DK, w, thread)
    T.barrier_arrive(bars.D_free)
    if l2:
        T.barrier_wait(bars.D_free, parity)  # the other warpgroup has dots
        apply_norm(frag.rows, frag.dk, smem, s, Factor.RK, Dot.DK)
    T.sync_threads(OWN + w, 128)  # every warp's share of the products has read k
    T.copy(frag.dk, frag.rows)
    store(frag.rows, smem.k, s * 2 + w, thread)
    fence()
    T.barrier_arrive(bars.dq_dk_ready[s])


def stored_R_factor(smem: Any, s: Any, i: Any) -> Any:
    """The factor of R S^T in dk, for the stored R: -beta e^G rk / `R_scale`."""
    return -(
        remaining_beta(smem.factors[s, Factor.BETA, i])
        * smem.factors[s, Factor.RK, i]
        * T.exp2(smem.G2[s, i])
    )


@T.macro
def apply_norm(x: Any, dx: Any, smem: Any, s: Any, norm: int, dot: int) -> None:
    """Turn dx, r times the gradient of r x, into that of x, where r = 1 / sqrt(sum x^2 + eps). The
    inner product is that of dx itself: where dx is nearly parallel to x, nearly all cancels."""
    for i, j in T.Parallel(C, COLUMNS):
        r = smem.factors[s, norm, i]
        dx[i, j] -= r * r * sum_blocks(smem, s, dot, i) * x[i, j]
