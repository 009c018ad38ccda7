"""The intra-chunk stage of `prepare`, by one warpgroup: M and P of a chunk, and their factors.

    rq, rk = 1 / sqrt(sum x^2 + 1e-6) over the rows of q and k if the L2 norm is fused, else 1
    M_ij = beta_i e^{G_i - G_j} rk_i rk_j k_i.k_j  for i > j          [C, C]
    A = (I + M)^-1,  A_v = A diag(beta)                                [C, C]
    P_ij = scale e^{G_i - G_j} rq_i rk_j q_i.k_j  for i >= j           [C, C]

A warp has 16 rows of each matrix and computes only the column blocks of 16 that are not above the
diagonal. The exponential above the diagonal may be infinite; it is dropped by a selection, never by
a product with zero. `block_inverse.py` computes A and A_v.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.definition import L2_EPS
from gdn.problem import CHUNK as C

from ..tile.fragments import store
from ..tile.layout import (
    BETA,
    BETA_RK,
    COLUMN_EXPONENT,
    KEY_SQUARES,
    KS_FACTOR,
    RK,
    S_FACTOR,
    SCALE_RQ,
    U_FACTOR,
    G,
)
from .block_inverse import BlockInverseSmem
from .warp_blocks import BLOCK


class IntraChunkSmem:
    """Shared memory of one chunk."""

    def __init__(self, K: int, dtype: str, parts: int) -> None:
        self.q, self.k = (T.alloc_shared((1, C, K), dtype) for _ in range(2))
        self.inverse = BlockInverseSmem(parts)
        self.gates = T.alloc_shared((2, 2, C), "float32")  # G and beta; of this chunk and the next
        self.token_factors = T.alloc_shared((KEY_SQUARES + 1, C), "float32")
        self.P = self.q  # [1, C, C] in q's place
        self.A_v = T.alloc_shared((1, C, C), dtype)
        T.annotate_layout({self.A_v: make_full_bank_swizzled_layout(self.A_v)})


class IntraChunkFragments:
    """Registers of the warpgroup."""

    def __init__(self, dtype: str) -> None:
        self.M = T.alloc_fragment((C, C), "float32")  # k k^T, then M
        self.P = T.alloc_fragment((C, C), "float32")  # q k^T, then P
        self.P_half = T.alloc_fragment((C, C), dtype)
        self.row_G = T.alloc_fragment((C,), "float32")
        self.row_factor = T.alloc_fragment((C,), "float32")


@T.macro
def compute_k_norm(
    smem: Any, norms: Any, slot: Any, key_head: Any, token: Any, l2: bool, save: bool
) -> None:
    """token_factors[RK] of one token, from its KEY_SQUARES."""
    smem.token_factors[RK, token] = (
        T.rsqrt(smem.token_factors[KEY_SQUARES, token] + L2_EPS) if l2 else 1.0
    )
    if save:
        norms[slot, key_head, 1, token] = smem.token_factors[RK, token]


@T.macro
def compute_k_factors(
    smem: Any, b: Any, scan_factors: Any, slot: Any, head: Any, token: Any, l2: bool
) -> None:
    """The factors of one token that need no q: for M and P to shared memory, for `scan` to memory.
    gates[b] are the chunk's."""
    at = T.alloc_local((3,), "float32")  # G, e^G, rk
    at[0] = smem.gates[b, G, token]
    at[1] = T.exp2(at[0])
    at[2] = smem.token_factors[RK, token]
    smem.token_factors[COLUMN_EXPONENT, token] = at[0] - (T.log2(at[2]) if l2 else 0.0)
    smem.token_factors[BETA_RK, token] = smem.gates[b, BETA, token] * at[2]
    scan_factors[slot, head, U_FACTOR, token] = T.exp2(smem.gates[b, G, C - 1] - at[0]) * at[2]
    scan_factors[slot, head, KS_FACTOR, token] = -at[1] * at[2]
    if token == C - 1:
        scan_factors[slot, head, S_FACTOR, 0] = at[1]


@T.macro
def compute_q_norm(
    smem: Any, norms: Any, slot: Any, key_head: Any, token: Any, scale: Any, l2: bool, save: bool
) -> None:
    """token_factors[SCALE_RQ] of one token, from the sum of squares that stands there."""
    rq = T.alloc_local((1,), "float32")
    rq[0] = T.rsqrt(smem.token_factors[SCALE_RQ, token] + L2_EPS) if l2 else 1.0
    smem.token_factors[SCALE_RQ, token] = scale * rq[0]
    if save:
        norms[slot, key_head, 0, token] = rq[0]


@T.macro
def load_row_factors(smem: Any, frag: Any, b: Any, factor: int) -> None:
    """G and a factor of the rows, to the registers that `scale_block` reads."""
    for i in T.Parallel(C):
        frag.row_G[i] = smem.gates[b, G, i]
        frag.row_factor[i] = smem.token_factors[factor, i]


@T.macro
def scale_block(x: Any, smem: Any, frag: Any, block: Any) -> None:
    """Multiply a column block of x by e^{G_i - G_j} rk_j and the factor of row i."""
    for i, j in T.Parallel(C, BLOCK):
        x[i, block * BLOCK + j] *= (
            T.exp2(frag.row_G[i] - smem.token_factors[COLUMN_EXPONENT, block * BLOCK + j])
            * frag.row_factor[i]
        )


@T.macro
def clear_block(x: Any, block: Any) -> None:
    """Zero a column block of x."""
    for i, j in T.Parallel(C, BLOCK):
        x[i, block * BLOCK + j] = 0.0


@T.macro
def compute_M(smem: Any, frag: Any, b: Any, warp: Any) -> None:
    """M in frag.M, which holds k k^T. In a diagonal block, what is above the diagonal may be
    infinite; nothing reads it."""
    load_row_factors(smem, frag, b, BETA_RK)
    T.wait_wgmma(0)
    for block in T.unroll(C // BLOCK):
        if warp >= block:
            scale_block(frag.M, smem, frag, block)


@T.macro
def compute_P(smem: Any, frag: Any, b: Any, warp: Any, thread: Any) -> None:
    """P in smem.P; frag.P holds q k^T."""
    load_row_factors(smem, frag, b, SCALE_RQ)
    for block in T.unroll(C // BLOCK):
        if warp >= block:
            scale_block(frag.P, smem, frag, block)
        else:
            clear_block(frag.P, block)
        if warp == block:
            for i, j in T.Parallel(C, BLOCK):
                frag.P[i, block * BLOCK + j] = T.if_then_else(
                    i % BLOCK >= j, frag.P[i, block * BLOCK + j], 0.0
                )
    T.copy(frag.P, frag.P_half)
    store(frag.P_half, smem.P, 0, thread)
