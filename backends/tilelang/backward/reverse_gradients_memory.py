"""Shared memory and barriers of `reverse_gradients.py`, and how its producer warp loads."""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from .factors import Factor, rows_of_factors
from .gradients_memory import COLUMNS, load_rows

HALVES = (0, 1)
"""Halves of 64 of K and of V, which are 128."""


class ReverseGradientsSmem:
    """Shared memory of a thread block. Two chunks take turns in two slots s. q, k: half h of K of
    slot s is number 2 s + h. do, R, U: two halves of V. S, dS: the tile [64 of V, 64 of K] of half
    h of K and half v of V is number 2 h + v. Factors and sums: the first index is the slot."""

    def __init__(self, dtype: str) -> None:
        # === loaded, for two chunks; in the end dq and dk, which are stored from there ===
        self.q, self.k = (T.alloc_shared((4, C, COLUMNS), dtype) for _ in range(2))
        self.factors = T.alloc_shared((2, rows_of_factors(128, False), C), "float32")
        # === loaded, for a chunk ===
        self.do = T.alloc_shared((2, C, COLUMNS), dtype)
        self.R = T.alloc_shared((2, C, COLUMNS), dtype)  # v, then the stored R in its place
        self.U = T.alloc_shared((2, COLUMNS, C), dtype)  # U^T
        self.A = T.alloc_shared((1, C, C), dtype)  # then D in its place
        self.S = T.alloc_shared((4, COLUMNS, COLUMNS), dtype)  # S^T
        # === computed ===
        self.dS = T.alloc_shared((4, COLUMNS, COLUMNS), dtype)  # dS^T, of the end of the chunk
        self.P = T.alloc_shared((1, C, C), dtype)
        self.F = T.alloc_shared((1, C, C), dtype)
        T.annotate_layout(
            {
                x: make_full_bank_swizzled_layout(x)
                for x in (self.q, self.k, self.do, self.R, self.U, self.A, self.S, self.dS, self.P,
                          self.F)
            }
        )  # fmt: skip
        # factors of tokens, for two chunks; see `reverse_scan_memory.py`
        self.G2, self.P_factor, self.KdS_factor, self.dO_factor, self.R_factor, self.R_scale = (
            T.alloc_shared((2, C), "float32") for _ in range(6)
        )
        self.column_exponent = T.alloc_shared((2, C), "float32")  # G2 - log2 rk
        self.up_down = None
        # === sums, for two chunks, as in `gradients_memory.py` ===
        self.row_dots = T.alloc_shared((2, 5, 2, C), "float32")
        self.pair_row_sums = T.alloc_shared((2, 2, C), "float32")
        self.pair_column_sums = T.alloc_shared((2, 2, 4, C), "float32")
        self.S_dS = T.alloc_shared((2, 8), "float32")
        self.RV = T.alloc_shared((2, 8, C), "float32")  # sums of R * V over 16 columns of V

    def rowsum_RV(self, s: Any, i: Any) -> Any:
        """rowsum(R * V) of token i."""
        return sum((self.RV[s, warp, i] for warp in range(1, 8)), self.RV[s, 0, i])


class Barriers:
    """Barriers, with the number of threads that arrive. [2]: one for each of two chunks."""

    def __init__(self) -> None:
        self.qk_ready = T.alloc_barrier([32] * 2)  # and the factors
        self.qk_free = T.alloc_barrier([32] * 2)  # dq and dk have been stored
        self.factors_free = T.alloc_barrier([64] * 2)  # factors and sums have been used
        self.do_ready, self.v_ready, self.U_ready, self.A_ready, self.S_ready = (
            T.alloc_barrier(32) for _ in range(5)
        )
        self.do_free, self.U_free = (T.alloc_barrier(384) for _ in range(2))
        self.S_free = T.alloc_barrier(256)
        self.R_ready = T.alloc_barrier(256)
        self.R_read = T.alloc_barrier(384)
        self.R_free = T.alloc_barrier(32)
        self.P_ready = T.alloc_barrier(128)
        self.F_ready, self.D_ready = (T.alloc_barrier(128) for _ in range(2))  # and sums
        self.F_free, self.D_free = (T.alloc_barrier(256) for _ in range(2))  # and row dots
        self.dq_dk_ready = T.alloc_barrier([256] * 2)


@T.macro
def load_chunk(
    q: Any, k: Any, v: Any, do: Any, G_beta: Any, norms: Any, A: Any, U: Any, S: Any, smem: Any,
    bars: Any, batch: Any, token: Any, slot: Any, head: Any, step: Any,
) -> None:  # fmt: skip
    """Load the chunk of a step, whose first token is `token`; by one warp. In the order in which
    places become free."""
    s = step % 2
    T.barrier_wait(bars.qk_free[s], step // 2 % 2 ^ 1)
    for h in HALVES:
        for source, target in ((q, smem.q), (k, smem.k)):
            T.tma_copy(
                source[batch, token : token + C, head, h * COLUMNS : (h + 1) * COLUMNS],
                target[s * 2 + h, :, :], barrier=bars.qk_ready[s], leader_scope_threads=32,
            )  # fmt: skip
    T.barrier_wait(bars.factors_free[s], step // 2 % 2 ^ 1)
    T.tma_copy(
        G_beta[slot, head, :, :], smem.factors[s, Factor.G_BETA, :],
        barrier=bars.qk_ready[s], leader_scope_threads=32,
    )  # fmt: skip
    T.tma_copy(
        norms[slot, head, :, :], smem.factors[s, Factor.NORMS, :],
        barrier=bars.qk_ready[s], leader_scope_threads=32,
    )  # fmt: skip
    T.barrier_arrive(bars.qk_ready[s])
    T.barrier_wait(bars.do_free, step % 2 ^ 1)
    load_rows(do, smem.do, bars.do_ready, batch, token, head)
    T.barrier_arrive(bars.do_ready)
    T.barrier_wait(bars.U_free, step % 2 ^ 1)
    for half in HALVES:
        T.tma_copy(
            U[slot, head, half * COLUMNS : (half + 1) * COLUMNS, :],
            smem.U[half, :, :], barrier=bars.U_ready, leader_scope_threads=32,
        )  # fmt: skip
    T.barrier_arrive(bars.U_ready)
    T.barrier_wait(bars.S_free, step % 2 ^ 1)
    for tile in (0, 1, 2, 3):
        T.tma_copy(
            S[
                slot, head, tile % 2 * COLUMNS : tile % 2 * COLUMNS + COLUMNS,
                tile // 2 * COLUMNS : tile // 2 * COLUMNS + COLUMNS,
            ],
            smem.S[tile, :, :], barrier=bars.S_ready, leader_scope_threads=32,
        )  # fmt: skip
    T.barrier_arrive(bars.S_ready)
    T.barrier_wait(bars.D_free, step % 2 ^ 1)
    T.tma_copy(A[slot, head, :, :], smem.A[0, :, :], barrier=bars.A_ready, leader_scope_threads=32)
    T.barrier_arrive(bars.A_ready)
    T.barrier_wait(bars.R_free, step % 2 ^ 1)
    load_rows(v, smem.R, bars.v_ready, batch, token, head)
    T.barrier_arrive(bars.v_ready)
