"""Taking 64 rows of the transposed state through a chunk, by one warpgroup.

    U = A_v (V - e^G rk * (K S))
    O = scale e^G rq * (Q S) + P U
    S <- e^gamma S + K^T (e^{gamma - G} rk * U)

All of it transposed: S^T [64, K] and U^T [64, C] are the left operands of their products, which
tensor cores take from registers, so that the state never leaves them.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragments import load_transposed, store_transposed
from ..tile.layout import DECAY, ONTO, READ, ROWS, THROUGH


class Tile:
    """Registers of the warpgroup."""

    def __init__(self, K: int, dtype: str) -> None:
        self.S = T.alloc_fragment((ROWS, K), "float32")
        self.before = T.alloc_fragment((ROWS, K), dtype)
        self.known = T.alloc_fragment((ROWS, C), "float32")
        self.U = T.alloc_fragment((ROWS, C), "float32")
        self.values = T.alloc_fragment((ROWS, C), dtype)
        self.half = T.alloc_fragment((ROWS, C), dtype)
        self.written = T.alloc_fragment((ROWS, C), dtype)
        self.O = T.alloc_fragment((ROWS, C), "float32")


@T.macro
def load_state(t: Any, begin: Any, n: Any, head: Any, row: Any, v_first: bool) -> None:
    """t.S from `row` of V of the state [N, HV, K, V] ([N, HV, V, K] if v_first)."""
    for i, j in T.Parallel(*t.S.shape):
        if v_first:
            t.S[i, j] = begin[n, head, row + i, j]
        else:
            t.S[i, j] = begin[n, head, j, row + i]


@T.macro
def unit_state(t: Any, row: Any) -> None:
    """t.S as the rows from `row` of a unit matrix [K, K]; zero if row is below 0."""
    for i, j in T.Parallel(*t.S.shape):
        t.S[i, j] = T.if_then_else(row + i == j, 1.0, 0.0)


@T.macro
def store_state(t: Any, end: Any, n: Any, head: Any, row: Any, v_first: bool) -> None:
    """The inverse of `load_state`."""
    for i, j in T.Parallel(*t.S.shape):
        if v_first:
            end[n, head, row + i, j] = t.S[i, j]
        else:
            end[n, head, j, row + i] = t.S[i, j]


@T.macro
def compute_KS(t: Any, m: Any, s: Any, v: Any, thread: Any) -> None:
    """The first half of a chunk, in place s of shared memory m: K S, and V in place v, which is not
    read again."""
    T.wgmma_gemm(t.before, m.k[s, :, :], t.known, transpose_B=True, clear_accum=True)
    load_transposed(m.v, v, t.values, thread)
    for i, j in T.Parallel(*t.S.shape):
        t.S[i, j] *= m.walk[s, DECAY, 0]
    T.wait_wgmma(0)


@T.macro
def compute_U(t: Any, m: Any, s: Any) -> None:
    """U and Q S, on their way."""
    for i, j in T.Parallel(ROWS, C):
        t.half[i, j] = t.values[i, j] + m.walk[s, THROUGH, j] * t.known[i, j]
    T.wgmma_gemm(t.half, m.A_v[s, :, :], t.U, transpose_B=True, clear_accum=True)
    T.wgmma_gemm(t.before, m.q[s, :, :], t.O, transpose_B=True, clear_accum=True)


@T.macro
def scan_step(t: Any, m: Any, s: Any, scored: Any, p: Any, parity: Any, output: bool) -> None:
    """The other half: t.S after the chunk, and t.O (output); scored[p] says that P is there."""
    T.wait_wgmma(1)
    for i, j in T.Parallel(ROWS, C):
        t.written[i, j] = t.U[i, j] * m.walk[s, ONTO, j]
    T.wgmma_gemm(t.written, m.k[s, :, :], t.S)
    T.copy(t.U, t.half)
    T.wait_wgmma(1)
    for i, j in T.Parallel(ROWS, C):
        t.O[i, j] *= m.walk[s, READ, j]
    if output:
        T.barrier_wait(scored[p], parity)
    T.wgmma_gemm(t.half, m.P[p, :, :], t.O, transpose_B=True)
    T.wait_wgmma(1)
    T.copy(t.S, t.before)
    T.wait_wgmma(0)


@T.macro
def stage_output(t: Any, o: Any, place: Any, thread: Any) -> None:
    """t.O to o[place], shared memory of [C, ROWS]."""
    T.copy(t.O, t.half)
    store_transposed(t.half, o, place, thread, 0)
