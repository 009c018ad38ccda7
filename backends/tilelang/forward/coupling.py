"""The coupling of the tokens of a chunk, for `fused.py`: P and A_v, by one warpgroup.

`intra_chunk.py` has the equations. A warp has 16 rows of each matrix, and only blocks of 16 columns
that are not above the diagonal. Let R_b be G at the last token of block b. Left of the diagonal

    e^{G_i - G_j} = e^{G_i - R_b} e^{R_b - G_j}    for j in block b

needs no exponential a matrix element, and neither factor exceeds 1.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.definition import L2_EPS
from gdn.problem import CHUNK as C

from ..tile.layout import BETA, KS_FACTOR, QS_FACTOR, S_FACTOR, U_FACTOR, G
from .block_inverse import (
    BLOCK,
    BLOCKS,
    BlockInverseSmem,
    invert_diagonal_block,
    solve_rows,
    store_M_block,
)

SUM, COLUMN_EXPONENT, COLUMN_FACTOR, M_FACTOR, P_FACTOR, STRENGTH = range(6)
"""Rows of `tokens` [stages, 6, C], of each token: G, G - log2 rk, e^{R_b - G} rk, beta rk,
scale rq, and beta."""


class CouplingFragments:
    """Registers of the warpgroup."""

    def __init__(self, dtype: str) -> None:
        self.M = T.alloc_fragment((C, C), "float32")  # k k^T, then M
        self.P = T.alloc_fragment((C, C), "float32")  # q k^T, then P
        self.half = T.alloc_fragment((C, C), dtype)  # what is stored of P
        self.row_G = T.alloc_fragment((C,), "float32")
        self.factor = T.alloc_fragment((C,), "float32")
        self.decay = T.alloc_fragment((C,), "float32")


@T.macro
def load_row_factors(tokens: Any, s: Any, frag: Any, row: int) -> None:
    """What the rows are multiplied by."""
    for i in T.Parallel(C):
        frag.row_G[i] = tokens[s, SUM, i]
        frag.factor[i] = tokens[s, row, i]


@T.macro
def scale_block(x: Any, tokens: Any, s: Any, frag: Any, block: Any, warp: Any) -> None:
    """Multiply a column block of x by e^{G_i - G_j} rk_j and the factor of row i. In the diagonal
    block, what is above the diagonal may be infinite."""
    if warp == block:
        for i, j in T.Parallel(C, BLOCK):
            x[i, block * BLOCK + j] *= (
                T.exp2(frag.row_G[i] - tokens[s, COLUMN_EXPONENT, block * BLOCK + j])
                * frag.factor[i]
            )
    else:
        for i in T.Parallel(C):
            frag.decay[i] = frag.factor[i] * T.exp2(
                frag.row_G[i] - tokens[s, SUM, block * BLOCK + BLOCK - 1]
            )
        for i, j in T.Parallel(C, BLOCK):
            x[i, block * BLOCK + j] *= frag.decay[i] * tokens[s, COLUMN_FACTOR, block * BLOCK + j]


@T.macro
def store_blocks(half: Any, tile: Any, s: Any, warp: Any, lane: Any) -> None:
    """Store a warp's rows of a fragment to tile[s], up to the diagonal block."""
    for pair in T.unroll(BLOCKS):
        if pair <= warp:
            T.call_extern(
                "handle",
                "gdn_store",
                T.address_of(tile[s, warp * 16 + lane % 16, pair * 16 + lane // 16 * 8]),
                half.data,
                pair,
            )


@T.macro
def couple(
    frag: Any, inv: BlockInverseSmem, q: Any, k: Any, P: Any, A_v: Any, tokens: Any, s: Any,
    warp: Any, lane: Any, barrier: int,
) -> None:  # fmt: skip
    """P[s] and A_v[s] from q[s] and k[s]; what is above their diagonal blocks stays. barrier: a
    named one for the warpgroup."""
    T.wgmma_gemm(k[s, :, :], k[s, :, :], frag.M, transpose_B=True, clear_accum=True)
    T.wgmma_gemm(q[s, :, :], k[s, :, :], frag.P, transpose_B=True, clear_accum=True)
    load_row_factors(tokens, s, frag, M_FACTOR)
    T.wait_wgmma(0)  # for both: ptxas serialises all products if one is in flight over branches
    for block in T.unroll(BLOCKS):
        if block <= warp:
            scale_block(frag.M, tokens, s, frag, block, warp)
            store_M_block(frag.M, inv, block, warp)
    T.sync_warp()
    invert_diagonal_block(inv, warp, lane % BLOCK)  # two lanes each compute the same row
    load_row_factors(tokens, s, frag, P_FACTOR)
    for block in T.unroll(BLOCKS):
        if block <= warp:
            scale_block(frag.P, tokens, s, frag, block, warp)
        if block == warp:
            for i, j in T.Parallel(C, BLOCK):
                frag.P[i, block * BLOCK + j] = T.if_then_else(
                    i % BLOCK >= j, frag.P[i, block * BLOCK + j], 0.0
                )
    T.copy(frag.P, frag.half)
    store_blocks(frag.half, P, s, warp, lane)
    T.sync_threads(barrier, 128)
    solve_rows(
        inv, T.address_of(tokens[s, STRENGTH, 0]), T.address_of(A_v[s, 0, 0]), warp, A_v.dtype
    )
    T.sync_threads(barrier, 128)


@T.macro
def compute_token_factors(smem: Any, s: Any, live: Any, scale: Any, lane: Any, l2: bool) -> None:
    """The factors of two tokens a lane, from the gates and the sums of squares."""
    at = T.alloc_local((5,), "float32")  # G, e^G, rk, rq, beta
    for n in T.unroll(2):
        token = lane * 2 + n
        at[0] = smem.gates[0, G, token]
        at[1] = T.exp2(at[0])
        at[2] = 1.0
        at[3] = scale
        at[4] = smem.gates[0, BETA, token]
        if l2:  # noqa: SIM102, known before the kernel is; the next is not
            if token < live:  # else the row may hold anything
                at[3] = scale * T.rsqrt(smem.norms[s, 0, token] + L2_EPS)
                at[2] = T.rsqrt(smem.norms[s, 1, token] + L2_EPS)
        smem.tokens[s, SUM, token] = at[0]
        smem.tokens[s, COLUMN_EXPONENT, token] = at[0] - (T.log2(at[2]) if l2 else 0.0)
        smem.tokens[s, COLUMN_FACTOR, token] = at[2] * T.exp2(
            smem.gates[0, G, token // BLOCK * BLOCK + BLOCK - 1] - at[0]
        )
        smem.tokens[s, M_FACTOR, token] = at[4] * at[2]
        smem.tokens[s, P_FACTOR, token] = at[3]
        smem.tokens[s, STRENGTH, token] = at[4]
        smem.scan_factors[s, U_FACTOR, token] = T.exp2(smem.gates[0, G, C - 1] - at[0]) * at[2]
        smem.scan_factors[s, QS_FACTOR, token] = at[1] * at[3]
        smem.scan_factors[s, KS_FACTOR, token] = -at[1] * at[2]
        if token == C - 1:
            smem.scan_factors[s, S_FACTOR, 0] = at[1]
