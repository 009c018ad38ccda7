"""Coupling the tokens of a chunk, by one warpgroup: all that needs no state.

    rq, rk = 1 / sqrt(sum x^2 + 1e-6) of the rows of q and k, where fused, else 1
    L_ij = exp(G_i - G_j),  A = (I + tril(beta_i L_ij rk_i rk_j k_i.k_j, -1))^-1
    A_v = A diag(beta),  P = scale tril(L_ij rq_i rk_j q_i.k_j)

A warp has 16 rows of each, and of them only what is not above the diagonal.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.definition import L2_EPS
from gdn.problem import CHUNK as C

from ..tile.fragments import store
from ..tile.layout import BETA, DECAY, INTO, ONTO, RK, SCORES, STRENGTH, THROUGH, G
from .inverse import BLOCK, Inverse, Merge, spread


class Memory:
    """Shared memory of a chunk: P takes the place of q, A_v that of the inverse."""

    def __init__(self, K: int, dtype: str) -> None:
        self.q, self.k = (T.alloc_shared((1, C, K), dtype) for _ in range(2))
        self.inverse = Inverse()
        self.gates = T.alloc_shared((2, 2, C), "float32")  # G and beta of this chunk and the next
        self.tokens = T.alloc_shared((RK + 1, C), "float32")
        self.P = self.q
        whole = self.inverse.whole
        self.A_v = whole if dtype == "float16" else T.view(whole, dtype=dtype)


class Registers:
    """Of the warpgroup."""

    def __init__(self, dtype: str) -> None:
        self.x = T.alloc_fragment((C, C), "float32")  # of k and k: M
        self.y = T.alloc_fragment((C, C), "float32")  # of q and k: P; then A
        self.half = T.alloc_fragment((C, C), dtype)
        self.row = T.alloc_fragment((C,), "float32")
        self.factor = T.alloc_fragment((C,), "float32")
        self.merge = Merge()


@T.macro
def norm_keys(m: Any, norms: Any, slot: Any, kh: Any, token: Any, l2: bool, save: bool) -> None:
    """m.tokens[RK] of one token, of the sum of squares that is there."""
    m.tokens[RK, token] = T.rsqrt(m.tokens[RK, token] + L2_EPS) if l2 else 1.0
    if save:
        norms[slot, kh, 1, token] = m.tokens[RK, token]


@T.macro
def factor_keys(m: Any, b: Any, walk: Any, slot: Any, head: Any, token: Any, l2: bool) -> None:
    """The factors of one token that k and the gates give."""
    at = T.alloc_local((3,), "float32")
    at[0] = m.gates[b, G, token]
    at[1] = T.exp2(at[0])
    at[2] = m.tokens[RK, token]
    m.tokens[INTO, token] = at[0] - (T.log2(at[2]) if l2 else 0.0)
    m.tokens[STRENGTH, token] = m.gates[b, BETA, token] * at[2]
    walk[slot, head, ONTO, token] = T.exp2(m.gates[b, G, C - 1] - at[0]) * at[2]
    walk[slot, head, THROUGH, token] = -at[1] * at[2]
    if token == C - 1:
        walk[slot, head, DECAY, 0] = at[1]


@T.macro
def norm_queries(
    m: Any, norms: Any, slot: Any, kh: Any, token: Any, scale: Any, l2: bool, save: bool
) -> None:
    """m.tokens[SCORES] of one token, of the sum of squares that is there."""
    rq = T.alloc_local((1,), "float32")
    rq[0] = T.rsqrt(m.tokens[SCORES, token] + L2_EPS) if l2 else 1.0
    m.tokens[SCORES, token] = scale * rq[0]
    if save:
        norms[slot, kh, 0, token] = rq[0]


@T.macro
def find_rows(m: Any, r: Any, b: Any, factor: int) -> None:
    """G and a factor of the rows, for `weigh`."""
    for i in T.Parallel(C):
        r.row[i] = m.gates[b, G, i]
        r.factor[i] = m.tokens[factor, i]


@T.macro
def weigh(x: Any, m: Any, r: Any, block: Any) -> None:
    """16 columns of x times L and the factors of rows and columns."""
    for i, j in T.Parallel(C, BLOCK):
        x[i, block * BLOCK + j] *= (
            T.exp2(r.row[i] - m.tokens[INTO, block * BLOCK + j]) * r.factor[i]
        )


@T.macro
def clear_columns(x: Any, block: Any) -> None:
    for i, j in T.Parallel(C, BLOCK):
        x[i, block * BLOCK + j] = 0.0


@T.macro
def couple_keys(m: Any, r: Any, b: Any, warp: Any) -> None:
    """M in registers, on its way to where `inverse.py` wants it; r.x is k and k."""
    find_rows(m, r, b, STRENGTH)
    T.wait_wgmma(0)
    # above the diagonal, where it may be infinite, it is dropped
    for block in T.unroll(C // BLOCK):
        if warp >= block:
            weigh(r.x, m, r, block)
            spread(r.x, m.inverse, block, warp)


@T.macro
def couple_queries(m: Any, r: Any, b: Any, warp: Any, thread: Any) -> None:
    """P in q's place; r.y is q and k."""
    find_rows(m, r, b, SCORES)
    for block in T.unroll(C // BLOCK):
        if warp >= block:
            weigh(r.y, m, r, block)
        else:
            clear_columns(r.y, block)
        if warp == block:
            for i, j in T.Parallel(C, BLOCK):
                r.y[i, block * BLOCK + j] = T.if_then_else(
                    i % BLOCK >= j, r.y[i, block * BLOCK + j], 0.0
                )
    T.copy(r.y, r.half)
    store(r.half, m.P, 0, thread)


@T.macro
def find_strengths(m: Any, r: Any, b: Any, warp: Any, refined: bool) -> None:
    """A_v in r.half, of A, in r.y if refined, else in m.inverse.whole."""
    for block in T.unroll(C // BLOCK):
        if not refined:
            if warp >= block:
                for i, j in T.Parallel(C, BLOCK):
                    r.y[i, block * BLOCK + j] = m.inverse.whole[0, i, block * BLOCK + j]
            else:
                clear_columns(r.y, block)
        if warp >= block:
            for i, j in T.Parallel(C, BLOCK):
                r.y[i, block * BLOCK + j] *= m.gates[b, BETA, block * BLOCK + j]
    T.copy(r.y, r.half)
