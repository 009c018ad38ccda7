"""Of a chunk's gradients, what passes through the states, for 64 columns of K, by one warpgroup.

    dQ += scale e^G * (dO S^T)
    dK += e^{gamma - G} * (U dS^T) - beta e^G * (R S^T)

with the products of each row with that of q, k and k, and <S, dS>, for the gradients of the gates;
and after the last value head, with F = dP * L and D summed over the heads,

    dQ += scale F K,  dK += scale F^T Q + (D + D^T) K

and the gradients through the L2 norm.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragment_sums import sum_rows
from ..tile.gate_math import remaining_beta
from ..tile.indexing import rolled_loop
from ..tile.layout import LOG2_E
from ..tile.ragged_rows import store_row

COLUMNS = 64
READ, KNOWN, WRITTEN, SQUARE_Q, SQUARE_K = range(5)
"""What `Memory.dots` holds: a row's product with its inter-chunk gradient, and through the norm."""


def sum_over(m: Any, b: Any, which: int, i: Any) -> Any:
    """A row's sum over all columns of K."""
    rows = [m.dots[b, which, h, i] for h in range(int(m.q.shape[0]))]
    return rows[0] if len(rows) == 1 else rows[0] + rows[1]


class Columns:
    """Registers of the warpgroup."""

    def __init__(self, dtype: str) -> None:
        self.dq, self.dk, self.one = (T.alloc_fragment((C, COLUMNS), "float32") for _ in range(3))
        self.half, self.other = (T.alloc_fragment((C, COLUMNS), dtype) for _ in range(2))
        self.carried = T.alloc_local((1,), "float32")
        self.before, self.after = (T.alloc_local((8,), dtype) for _ in range(2))


@T.macro
def multiply_rows(x: Any, y: Any, m: Any, c: Any, b: Any, which: int, h: Any, thread: Any) -> None:
    """m.dots[b, which, h]: the rows of x times those of y, both in registers; c.one is used up."""
    for i, j in T.Parallel(C, COLUMNS):
        c.one[i, j] = x[i, j] * y[i, j]
    sum_rows(c.one, T.address_of(m.dots[b, which, h, thread // 32 * 16]))


@T.macro
def fold_queries(m: Any, c: Any, b: Any, h: Any, scale: Any, thread: Any) -> None:
    """c.one = dO S^T, into dQ; c.half = q."""
    for i, j in T.Parallel(C, COLUMNS):
        c.dq[i, j] += scale * T.exp2(m.factors[b, 0, i] * LOG2_E) * c.one[i, j]
    multiply_rows(c.one, c.half, m, c, b, READ, h, thread)


@T.macro
def fold_known(m: Any, c: Any, b: Any, h: Any, thread: Any) -> None:
    """c.one = R S^T, into dK; c.half = k."""
    for i, j in T.Parallel(C, COLUMNS):
        c.dk[i, j] -= (
            remaining_beta(m.factors[b, 1, i]) * T.exp2(m.factors[b, 0, i] * LOG2_E) * c.one[i, j]
        )
    multiply_rows(c.one, c.half, m, c, b, KNOWN, h, thread)


@T.macro
def fold_written(m: Any, c: Any, b: Any, h: Any, thread: Any) -> None:
    """c.one = U dS^T, into dK; c.half = k."""
    for i, j in T.Parallel(C, COLUMNS):
        c.dk[i, j] += T.exp2((m.factors[b, 0, C - 1] - m.factors[b, 0, i]) * LOG2_E) * c.one[i, j]
    multiply_rows(c.one, c.half, m, c, b, WRITTEN, h, thread)


@T.macro
def multiply_states(m: Any, c: Any, b: Any, h: Any, thread: Any) -> None:
    """Each warp's share of <S, dS>."""
    c.carried[0] = 0.0
    for step in T.serial(m.S.shape[1] // 16):
        row, column = step * 16 + thread // 8, thread % 8 * 8
        for i in T.vectorized(8):
            c.before[i] = m.S[h, row, column + i]
        for i in T.vectorized(8):
            c.after[i] = m.dS[h, row, column + i]
        for i in T.unroll(8):
            c.carried[0] += T.cast(c.before[i], "float32") * T.cast(c.after[i], "float32")
    c.carried[0] = T.warp_reduce_sum(c.carried[0])
    if thread % 32 == 0:
        m.carried[b, h * 4 + thread // 32] = c.carried[0]


@T.macro
def through_states(
    m: Any, c: Any, bars: Any, h: Any, r: Any, g: Any, group: int, even: Any, scale: Any,
    thread: Any,
) -> None:  # fmt: skip
    """Value head g of its q/k head, the program's number r."""
    b = r % 2
    T.barrier_wait(bars.after, r % 2)
    T.wgmma_gemm(m.U[b, :, :], m.dS[h, :, :], c.one, transpose_A=True, clear_accum=True)
    if g == 0:
        T.barrier_wait(bars.keys, even)
    T.copy(m.k[h, :, :], c.half)
    T.wait_wgmma(0)
    fold_written(m, c, b, h, thread)
    T.barrier_wait(bars.before, r % 2)
    T.wgmma_gemm(m.do[b, :, :], m.S[h, :, :], c.one, clear_accum=True)
    multiply_states(m, c, b, h, thread)
    T.copy(m.q[h, :, :], c.half)
    T.wait_wgmma(0)
    T.barrier_arrive(bars.after_free)
    fold_queries(m, c, b, h, scale, thread)
    T.wgmma_gemm(m.R[b, :, :], m.S[h, :, :], c.one, clear_accum=True)
    T.wait_wgmma(0)
    T.copy(m.k[h, :, :], c.half)
    if g < group - 1:
        T.barrier_arrive(bars.before_free)
    else:
        T.barrier_arrive(bars.tiles_free)
    fold_known(m, c, b, h, thread)


@T.macro
def within_chunk(m: Any, c: Any, h: Any) -> None:
    """What the tokens of the chunk owe each other."""
    T.wgmma_gemm(m.F_q, m.k[h, :, :], c.dq)
    T.wgmma_gemm(m.F_k, m.q[h, :, :], c.dk, transpose_A=True)
    T.wgmma_gemm(m.D, m.k[h, :, :], c.dk)
    T.wgmma_gemm(m.D_turned, m.k[h, :, :], c.dk, transpose_A=True)
    T.wait_wgmma(0)


@T.macro
def through_norm(x: Any, dx: Any, m: Any, even: Any, norm: int, which: int) -> None:
    """dx, the gradient of r x, to that of x; r = 1 / sqrt(sum x^2 + eps) is m.norms[even, norm]."""
    for i, j in T.Parallel(C, COLUMNS):
        r = m.norms[even, norm, i]
        dx[i, j] = r * (dx[i, j] - r * r * sum_over(m, 0, which, i) * x[i, j])


@T.macro
def through_norms(m: Any, c: Any, even: Any, h: Any, free: Any, sync: int, thread: Any) -> None:
    """dq and dk through the L2 norm; `free` learns when q and k are no longer needed."""
    T.copy(m.q[h, :, :], c.half)
    T.copy(m.k[h, :, :], c.other)
    T.barrier_arrive(free)
    multiply_rows(c.dq, c.half, m, c, 0, SQUARE_Q, h, thread)
    multiply_rows(c.dk, c.other, m, c, 0, SQUARE_K, h, thread)
    T.sync_threads(sync, m.q.shape[0] * 128)
    through_norm(c.half, c.dq, m, even, 0, SQUARE_Q)
    through_norm(c.other, c.dk, m, even, 1, SQUARE_K)


@T.macro
def stage_columns(m: Any, c: Any, b: Any, h: Any, sync: int) -> None:
    """64 columns of dq and dk to where there is room for them, b: place of the last value head."""
    if not m.apart:
        T.sync_threads(sync, m.q.shape[0] * 128)  # nobody multiplies by the tiles any more
    for which, dx in enumerate((c.dq, c.dk)):
        T.copy(dx, c.half)
        to, place, row, column = m.out(which, b, h)
        T.copy(c.half, to[place, row : row + C, column : column + COLUMNS])
    T.fence_proxy_async()


@T.macro
def store_columns(
    m: Any, dq: Any, dk: Any, b: Any, batch: Any, at: Any, live: Any, kh: Any, lane: Any
) -> None:
    """What is staged of dq and dk to memory, by one warp."""
    staged = [
        (to, h * COLUMNS, *m.out(which, b, h))
        for which, to in enumerate((dq, dk))
        for h in range(int(m.q.shape[0]))
    ]
    if live >= C:
        for to, first, x, place, row, column in staged:
            T.tma_copy(
                x[place, row : row + C, column : column + COLUMNS],
                to[batch, at : at + C, kh, first : first + COLUMNS], leader_scope_threads=32,
            )  # fmt: skip
        T.tma_store_wait(0)
    else:
        for i in rolled_loop(live):
            for to, first, x, place, row, column in staged:
                store_row(x, place, row + i, column, to, batch, at + i, kh, first, lane)
