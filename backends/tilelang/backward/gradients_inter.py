"""`gradients.py`, inter-chunk: gradients through the states, for 64 columns of K; one warpgroup.

For every value head, with the normalised rows Q and K:

    dQ += scale e^G * (dO S^T)
    dK += e^{gamma - G} * (U dS^T) - beta e^G * (R S^T)

and, for the gradients of its gates and beta, the inner products `Dot` and <S, dS>. After the last
value head of the q/k head, with F and D of `gradients_intra.py`:

    dQ += scale F K
    dK += scale F^T Q + (D + D^T) K
    dq = rq (dQ - rq^2 (dQ . q) q)    for each raw row q, if the L2 norm is fused; dk likewise

dO, R, U: [C, V]; S, the state before the chunk, and dS, the gradient of the state after it:
[64, V] here; dQ, dK, Q, K: [C, 64] here. R is the stored one, and beta R = `remaining_beta` R.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragment_sums import sum_rows
from ..tile.gate_math import remaining_beta
from ..tile.indexing import rolled_loop
from ..tile.largest import reciprocal_power
from ..tile.layout import LOG2_E
from ..tile.ragged_rows import store_row
from .factors import Factor
from .gradients_memory import COLUMNS, Dot, row_scale


def sum_blocks(smem: Any, b: Any, dot: int, i: Any) -> Any:
    """`row_dots` of row i over all columns of K."""
    blocks = [smem.row_dots[b, dot, h, i] for h in range(int(smem.row_dots.shape[2]))]
    return blocks[0] if len(blocks) == 1 else blocks[0] + blocks[1]


class InterFragments:
    """Registers of an inter-chunk warpgroup."""

    def __init__(self, dtype: str) -> None:
        # product: the latest one
        self.dq, self.dk, self.product = (
            T.alloc_fragment((C, COLUMNS), "float32") for _ in range(3)
        )
        # rows: of q or k, or dq or dk before they are staged; k_rows: of k while `rows` has q
        self.rows, self.k_rows = (T.alloc_fragment((C, COLUMNS), dtype) for _ in range(2))
        self.S_dS = T.alloc_local((1,), "float32")
        self.S, self.dS = (T.alloc_local((8,), dtype) for _ in range(2))
        self.largest_scales = T.alloc_local((2,), "float32")


@T.macro
def sum_row_dots(
    x: Any, y: Any, smem: Any, frag: Any, b: Any, dot: int, h: Any, thread: Any
) -> None:
    """row_dots[b, dot, h] = rowsum(x * y), both in registers. Overwrites frag.product."""
    for i, j in T.Parallel(C, COLUMNS):
        frag.product[i, j] = x[i, j] * y[i, j]
    sum_rows(frag.product, T.address_of(smem.row_dots[b, dot, h, thread // 32 * 16]))


@T.macro
def add_dO_S(smem: Any, frag: Any, b: Any, h: Any, scale: Any, thread: Any) -> None:
    """Add product = dO S^T to dQ; rows = q."""
    for i, j in T.Parallel(C, COLUMNS):
        frag.dq[i, j] += scale * T.exp2(smem.factors[b, Factor.G, i] * LOG2_E) * frag.product[i, j]
    sum_row_dots(frag.product, frag.rows, smem, frag, b, Dot.DO_S, h, thread)


@T.macro
def add_R_S(smem: Any, frag: Any, b: Any, h: Any, thread: Any) -> None:
    """Add product = R S^T to dK; rows = k."""
    for i, j in T.Parallel(C, COLUMNS):
        frag.dk[i, j] -= (
            remaining_beta(smem.factors[b, Factor.BETA, i])
            * T.exp2(smem.factors[b, Factor.G, i] * LOG2_E)
            * frag.product[i, j]
        )
    sum_row_dots(frag.product, frag.rows, smem, frag, b, Dot.R_S, h, thread)


@T.macro
def add_U_dS(smem: Any, frag: Any, b: Any, h: Any, thread: Any) -> None:
    """Add product = U dS^T to dK; rows = k."""
    for i, j in T.Parallel(C, COLUMNS):
        frag.dk[i, j] += (
            T.exp2((smem.factors[b, Factor.G, C - 1] - smem.factors[b, Factor.G, i]) * LOG2_E)
            * frag.product[i, j]
        )
    sum_row_dots(frag.product, frag.rows, smem, frag, b, Dot.U_DS, h, thread)


@T.macro
def sum_S_dS(smem: Any, frag: Any, b: Any, h: Any, thread: Any) -> None:
    """Compute each warp's share of <S, dS>. Other warps would take so long that the next S and dS
    came late."""
    frag.S_dS[0] = 0.0
    for step in T.serial(smem.S.shape[1] // 16):
        row, column = step * 16 + thread // 8, thread % 8 * 8
        for i in T.vectorized(8):
            frag.S[i] = smem.S[h, row, column + i]
        for i in T.vectorized(8):
            frag.dS[i] = smem.dS[h, row, column + i]
        for i in T.unroll(8):
            frag.S_dS[0] += T.cast(frag.S[i], "float32") * T.cast(frag.dS[i], "float32")
    frag.S_dS[0] = T.warp_reduce_sum(frag.S_dS[0])
    if thread % 32 == 0:
        smem.S_dS[b, h * 4 + thread // 32] = frag.S_dS[0]


@T.macro
def accumulate_inter_chunk(
    smem: Any, frag: Any, bars: Any, h: Any, n: Any, g: Any, group: int, parity: Any, scale: Any,
    named_barrier: int, thread: Any,
) -> None:  # fmt: skip
    """Add a value head, number g of the q/k head and number n of the thread block, to dQ and dK.
    named_barrier: of all inter-chunk warpgroups.

    This is the critical path. The first product needs neither q nor k: the wait for them overlaps
    it.
    """
    b = n % 2
    # === U dS^T ===
    T.barrier_wait(bars.dS_ready, n % 2)
    if smem.has_scales:  # noqa: SIM102, known before the kernel is; the next is not
        if frag.largest_scales[0] > 1:
            for i, j in T.Parallel(*smem.dS.shape[1:]):
                smem.dS[h, i, j] *= row_scale(smem, b, i)
            T.fence_proxy_async()
            T.sync_threads(named_barrier, smem.q.shape[0] * 128)
    T.wgmma_gemm(
        smem.U[b, :, :], smem.dS[h, :, :], frag.product, transpose_A=True, clear_accum=True
    )
    if g == 0:
        T.barrier_wait(bars.qk_ready, parity)
    T.copy(smem.k[h, :, :], frag.rows)
    T.wait_wgmma(0)
    if g == group - 1:
        T.barrier_arrive(bars.tiles_free)
    add_U_dS(smem, frag, b, h, thread)

    # === dO S^T ===
    T.barrier_wait(bars.S_ready, n % 2)
    T.wgmma_gemm(smem.do[b, :, :], smem.S[h, :, :], frag.product, clear_accum=True)
    T.sync_warp()  # else ptxas puts what follows between the product's instructions
    sum_S_dS(smem, frag, b, h, thread)
    T.copy(smem.q[h, :, :], frag.rows)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.dS_free)
    add_dO_S(smem, frag, b, h, scale, thread)

    # === R S^T ===
    T.wgmma_gemm(smem.R[b, :, :], smem.S[h, :, :], frag.product, clear_accum=True)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.S_free)
    T.copy(smem.k[h, :, :], frag.rows)
    add_R_S(smem, frag, b, h, thread)


@T.macro
def add_intra_chunk(smem: Any, frag: Any, b: Any, h: Any) -> None:
    """Add what F and D contribute to dQ and dK. In float16 they are over their scale. b: buffer of
    the chunk's last value head."""
    if smem.has_scales:
        down = T.alloc_var("float32")
        down = reciprocal_power(frag.largest_scales[1])
        for i, j in T.Parallel(C, COLUMNS):
            frag.dq[i, j] *= down
            frag.dk[i, j] *= down
    T.wgmma_gemm(smem.F_tile(0, b), smem.k[h, :, :], frag.dq)
    T.wgmma_gemm(smem.F_tile(1, b), smem.q[h, :, :], frag.dk, transpose_A=True)
    T.wgmma_gemm(smem.D, smem.k[h, :, :], frag.dk)
    T.wgmma_gemm(smem.D_t, smem.k[h, :, :], frag.dk, transpose_A=True)
    T.wait_wgmma(0)
    if smem.has_scales:
        for i, j in T.Parallel(C, COLUMNS):
            frag.dq[i, j] *= frag.largest_scales[1]
            frag.dk[i, j] *= frag.largest_scales[1]


@T.macro
def apply_norm(x: Any, dx: Any, smem: Any, parity: Any, norm: int, dot: int) -> None:
    """Turn dx, the gradient of r x, into that of x, where r = 1 / sqrt(sum x^2 + eps)."""
    for i, j in T.Parallel(C, COLUMNS):
        r = smem.norms[parity, norm, i]
        dx[i, j] = r * (dx[i, j] - r * r * sum_blocks(smem, 0, dot, i) * x[i, j])


@T.macro
def apply_norms(
    smem: Any, frag: Any, parity: Any, h: Any, qk_free: Any, named_barrier: int, thread: Any
) -> None:
    """Take dQ and dK through the L2 norm. named_barrier: of all inter-chunk warpgroups."""
    T.copy(smem.q[h, :, :], frag.rows)
    T.copy(smem.k[h, :, :], frag.k_rows)
    T.barrier_arrive(qk_free)
    sum_row_dots(frag.dq, frag.rows, smem, frag, 0, Dot.DQ, h, thread)
    sum_row_dots(frag.dk, frag.k_rows, smem, frag, 0, Dot.DK, h, thread)
    T.sync_threads(named_barrier, smem.q.shape[0] * 128)
    apply_norm(frag.rows, frag.dq, smem, parity, 0, Dot.DQ)
    apply_norm(frag.k_rows, frag.dk, smem, parity, 1, Dot.DK)


@T.macro
def stage_dq_dk(smem: Any, frag: Any, b: Any, h: Any) -> None:
    """Write 64 columns of dq and dk to shared memory. b: buffer of the chunk's last value head."""
    for which, dx in enumerate((frag.dq, frag.dk)):
        T.copy(dx, frag.rows)
        to, first, row, column = smem.staging(which, b, h)
        T.copy(frag.rows, to[first, row : row + C, column : column + COLUMNS])
    T.fence_proxy_async()


@T.macro
def store_dq_dk(
    smem: Any, dq: Any, dk: Any, b: Any, batch: Any, token: Any, live: Any, key_head: Any,
    lane: Any,
) -> None:  # fmt: skip
    """Store the live rows of dq and dk to memory; by one warp.

    `blocks` is a Python list, so that its loop is written out: for a TileLang loop over `tma_copy`,
    one thread would be elected for the whole loop.
    """
    blocks = [
        (to, h * COLUMNS, *smem.staging(which, b, h))
        for which, to in enumerate((dq, dk))
        for h in range(int(smem.q.shape[0]))
    ]
    if live >= C:
        for to, to_column, x, first, row, column in blocks:
            T.tma_copy(
                x[first, row : row + C, column : column + COLUMNS],
                to[batch, token : token + C, key_head, to_column : to_column + COLUMNS],
                leader_scope_threads=32,
            )  # fmt: skip
        T.tma_store_wait(0)
    else:
        for i in rolled_loop(live):
            for to, to_column, x, first, row, column in blocks:
                store_row(
                    x, first, row + i, column, to, batch, token + i, key_head, to_column, lane
                )
