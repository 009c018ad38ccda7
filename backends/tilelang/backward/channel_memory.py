"""Shared memory and registers of `channel_gradients.py`, and how it loads and stores."""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..tile.gate_math import WEAK, remaining_beta
from ..tile.layout import ROWS, token_rows
from .gradients_memory import COLUMNS, load_state

ENTRIES = 32
"""Pairs of a token and a channel of a thread."""

CHUNK_FIELDS = ("batch", "token", "live", "slot", "key_head", "head", "first", "last")
"""A value head of a chunk: what `locate_chunk` writes, and whether the head is the first or the
last one of its q/k head."""


def place(chunk: Any) -> tuple[Any, ...]:
    """Where `load_head` finds a value head."""
    return chunk.batch, chunk.token, chunk.slot, chunk.head


class Registers:
    """Of a thread: entries of `channel_entries.py`, and sums."""

    def __init__(self) -> None:
        self.prefix, self.suffix, self.dq, self.dk, self.terms = (
            T.alloc_local((ENTRIES,), "float32") for _ in range(5)
        )
        self.rights = T.alloc_local((ENTRIES // 2,), "float32")  # k right, of a token
        self.from_start = T.alloc_local((2,), "float32")  # of a channel


class ChannelGradientsSmem:
    """Shared memory of a thread block."""

    def __init__(self, K: int, V: int, dtype: str, parts: int) -> None:
        blocks = K // COLUMNS
        warps = 4 * blocks
        # === loaded, for a chunk: [C, K], blocks of 64 columns; dq and dk take their place ===
        self.q, self.k = (T.alloc_shared((blocks, C, COLUMNS), dtype) for _ in range(2))
        # === loaded, for a value head ===
        self.do_R = T.alloc_shared((2, C, V), dtype)
        self.U = T.alloc_shared((V, C), dtype)  # U^T
        self.S, self.dS = (T.alloc_shared((blocks, V, COLUMNS), dtype) for _ in range(2))
        self.factors = T.alloc_shared((3, C), "float32")  # beta, rq, rk
        self.RV = T.alloc_shared((V // ROWS, C), "float32")  # rowsum(R * V)
        self.scales = None
        if dtype == "float16":
            self.scales = T.alloc_shared((V // ROWS, ROWS), "float32")
        # === computed ===
        self.XY = T.alloc_shared((2 * parts, C, C), "bfloat16")  # X, and behind it Y
        # of X (the other row is not used); then what dq and dk lose along q and k
        self.diagonal = self.along = T.alloc_shared((2, C), "float32")
        # e^g, then the terms of dg, then dg: pairs of entries of each thread
        self.aside = T.alloc_shared((ENTRIES // 2, warps * 32, 2), "float32")
        self.S_dS = T.alloc_shared((4, K), "float32")  # sums over a quarter of V
        # of tokens: beta, what remains of it, and factors of X, Y and their columns; r of the norms
        self.beta, self.rest, self.rv = (T.alloc_shared((C,), "float32") for _ in range(3))
        self.row_factors = T.alloc_shared((2, C), "float32")  # scale rq, -rk
        self.norms = T.alloc_shared((2, C), "float32")  # rq, rk
        self.dots = T.alloc_shared((3, warps, C), "float32")  # k right, q dq, k dk; a row a warp
        self.dA_log = T.alloc_shared((warps,), "float32")
        T.annotate_layout({x: make_full_bank_swizzled_layout(x) for x in (self.q, self.k)})


@T.macro
def load_head(
    do: Any, R: Any, factors: Any, rowsum_RV: Any, U: Any, S: Any, dS: Any, row_scales: Any,
    smem: Any, ready: Any, batch: Any, token: Any, slot: Any, head: Any, K: int,
) -> None:  # fmt: skip
    """Load what a value head needs, by one warp."""
    first = token_rows(K)[0]
    for source, target in (
        (do[batch, token : token + C, head, :], smem.do_R[0, :, :]),
        (R[batch, token : token + C, head, :], smem.do_R[1, :, :]),
        (U[slot, head, :, :], smem.U),
        (factors[slot, head, first : first + 3, :], smem.factors),
        (rowsum_RV[slot, head, :, :], smem.RV),
    ):
        T.tma_copy(source, target, barrier=ready, leader_scope_threads=32)
    if smem.scales is not None:
        T.tma_copy(
            row_scales[slot, head, :, :], smem.scales, barrier=ready, leader_scope_threads=32
        )
    for b in T.unroll(smem.S.shape[0]):
        T.tma_copy(
            S[slot, head, :, b * COLUMNS : b * COLUMNS + COLUMNS], smem.S[b, :, :], barrier=ready,
            leader_scope_threads=32,
        )  # fmt: skip
    load_state(dS, smem.dS, ready, slot, head)


@T.macro
def store_weak_dv(
    smem: Any, dv: Any, batch: Any, token: Any, live: Any, head: Any, thread: Any
) -> None:
    """dv of tokens with small beta, of which R was stored: a warp a token, in turn."""
    V, warps = smem.do_R.shape[2], smem.dots.shape[1]
    for step in T.serial(C // warps):
        i = step * warps + thread // 32
        if T.And(i < live, smem.factors[0, i] <= WEAK):
            for block in T.unroll(V // ROWS):
                for j in T.vectorized(2):
                    dv[batch, token + i, head, block * ROWS + thread % 32 * 2 + j] = T.cast(
                        smem.do_R[1, i, block * ROWS + thread % 32 * 2 + j], "float32"
                    ) * remaining_beta(smem.factors[0, i])


@T.macro
def multiply_by_scales(smem: Any, h: Any) -> None:
    """dO, R and dS times the scales of the rows of S^T and U^T; dS by a warpgroup for its own
    columns, dO and R by one each, or both by the only one."""
    V, blocks = smem.do_R.shape[2], smem.S.shape[0]
    for i, j in T.Parallel(V, COLUMNS):
        smem.dS[h, i, j] *= smem.scales[i // ROWS, i % ROWS]
    for n in T.unroll(2 // blocks):
        for i, j in T.Parallel(C, V):
            smem.do_R[h + n, i, j] *= smem.scales[j // ROWS, j % ROWS]


@T.macro
def sum_S_dS(smem: Any, h: Any, x: Any) -> None:
    """Sums of S * dS over quarters of V, for every channel: two of them a thread."""
    V, quarter, pair = smem.S.shape[1], x // 32, x % 32
    total = T.alloc_local((2,), "float32")
    T.clear(total)
    for step in T.serial(V // 4):
        for e in T.unroll(2):
            total[e] += T.cast(smem.S[h, quarter * (V // 4) + step, pair * 2 + e], "float32") * (
                T.cast(smem.dS[h, quarter * (V // 4) + step, pair * 2 + e], "float32")
            )
    for e in T.vectorized(2):
        smem.S_dS[quarter, h * COLUMNS + pair * 2 + e] = total[e]


@T.macro
def store_rows(
    x: Any, to: Any, batch: Any, token: Any, live: Any, key_head: Any, thread: Any, threads: int
) -> None:
    """Store the live rows of a tile to those of dq or dk; whole chunks by one warp, by TMA, which
    the warp waits for later."""
    if live >= C:
        if thread < 32:
            for b in T.unroll(x.shape[0]):
                T.tma_copy(
                    x[b, :, :],
                    to[batch, token : token + C, key_head, b * COLUMNS : b * COLUMNS + COLUMNS],
                    leader_scope_threads=32,
                )  # fmt: skip
    else:
        K = x.shape[0] * COLUMNS
        for step in T.serial(C * K // (2 * threads)):
            i = (step * threads + thread) // (K // 2)
            column = (step * threads + thread) % (K // 2) * 2
            if i < live:
                for e in T.vectorized(2):
                    to[batch, token + i, key_head, column + e] = x[
                        column // COLUMNS, i, column % COLUMNS + e
                    ]
