"""Shared memory of `reverse_scan.py`, and the warps that fill and empty it."""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..tile.layout import ROWS
from ..tile.ragged_rows import store_live_rows

STAGES = 3


class Memory:
    """Shared memory: what is loaded, STAGES chunks of it; factors of tokens; what is stored."""

    def __init__(self, K: int, dtype: str) -> None:
        self.q, self.k = (T.alloc_shared((STAGES, C, K), dtype) for _ in range(2))
        self.do, self.v = (T.alloc_shared((STAGES, C, ROWS), dtype) for _ in range(2))
        self.A = T.alloc_shared((STAGES, C, C), dtype)
        self.factors = T.alloc_shared((STAGES, 4, C), "float32")
        self.G2 = T.alloc_shared((STAGES, C), "float32")  # G log2(e)
        self.rows = T.alloc_shared((STAGES, C), "float32")  # scale rq
        self.onto = T.alloc_shared((STAGES, C), "float32")  # e^{gamma - G} rk
        self.read = T.alloc_shared((STAGES, C), "float32")  # scale e^G rq
        self.through = T.alloc_shared((STAGES, C), "float32")  # -beta e^G rk
        self.kept = T.alloc_shared((STAGES, C), "float32")  # what R is multiplied by
        self.P = T.alloc_shared((C, C), dtype)
        self.dS = T.alloc_shared((1, ROWS, K), dtype)
        self.R = T.alloc_shared((1, C, ROWS), dtype)
        # R^T * V^T, pairs of rows summed; rows eight banks apart
        self.given = T.alloc_shared((ROWS // 2, C + 8), "float32")
        T.annotate_layout({x: make_full_bank_swizzled_layout(x) for x in (self.do, self.v, self.R)})


class Barriers:
    """Of what is loaded, stage by stage, and may be again; of P; and of what is stored."""

    def __init__(self) -> None:
        self.full = T.alloc_barrier([32] * STAGES)
        self.used = T.alloc_barrier([128] * STAGES)
        self.coupled, self.free = T.alloc_barrier(128), T.alloc_barrier(128)
        # dS, R and R * V are there; dS and R have been copied, R * V has been summed
        self.staged, self.left, self.summed = (T.alloc_barrier(n) for n in (128, 32, 32))


@T.macro
def load(
    q: Any, k: Any, v: Any, do: Any, factors: Any, norms: Any, inverse: Any, m: Any, bars: Any,
    batch: Any, at: Any, slot: Any, head: Any, kh: Any, first: Any, s: Any, keep: bool,
) -> None:  # fmt: skip
    """A chunk to stage s, by one warp."""
    for source, target in (
        (q[batch, at : at + C, kh, :], m.q[s, :, :]),
        (k[batch, at : at + C, kh, :], m.k[s, :, :]),
        (do[batch, at : at + C, head, first : first + ROWS], m.do[s, :, :]),
        (inverse[slot, head, :, :], m.A[s, :, :]),
        (factors[slot, head, :, :], m.factors[s, 0:2, :]),
        (norms[slot, kh, :, :], m.factors[s, 2:4, :]),
    ):
        T.tma_copy(source, target, barrier=bars.full[s], leader_scope_threads=32)
    if keep:
        T.tma_copy(
            v[batch, at : at + C, head, first : first + ROWS], m.v[s, :, :], barrier=bars.full[s],
            leader_scope_threads=32,
        )  # fmt: skip
    T.barrier_arrive(bars.full[s])


@T.macro
def store_chunk(
    m: Any, bars: Any, dS_out: Any, R_out: Any, given: Any, batch: Any, at: Any, live: Any,
    slot: Any, head: Any, block: Any, lane: Any,
) -> None:  # fmt: skip
    """What is staged of a chunk, to where it belongs, by one warp; of R the live rows. Says so."""
    first = block * ROWS
    T.tma_copy(m.dS[0, :, :], dS_out[slot, head, first : first + ROWS, :], leader_scope_threads=32)
    if live >= C:
        T.tma_copy(
            m.R[0, :, :], R_out[batch, at : at + C, head, first : first + ROWS],
            leader_scope_threads=32,
        )  # fmt: skip
    else:
        store_live_rows(m.R, 0, R_out, batch, at, live, head, first, lane)
    T.tma_store_wait(0)
    T.barrier_arrive(bars.left)
    total = T.alloc_local((2,), "float32")
    T.clear(total)
    for row in T.unroll(ROWS // 2):
        for e in T.vectorized(2):
            total[e] += m.given[row, lane * 2 + e]
    for e in T.vectorized(2):
        given[slot, head, block, lane * 2 + e] = total[e]
    T.barrier_arrive(bars.summed)
