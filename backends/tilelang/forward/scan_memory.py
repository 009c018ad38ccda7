"""Shared memory of `scan.py`, and the copies of its producer warp and its storing warp."""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..tile.layout import K_IN, K_OUT, Q_IN, ROWS, factor_rows


class ScanSmem:
    """Shared memory: a ring of stages, a chunk each; P has a ring of its own with fewer stages. v
    has a tile [C, 64] for every stage and consumer warpgroup, and o takes its place. k_out is k;
    with a decay per channel k is K_in, k_out is K_out and q is Q_in.

    The transfer scan has neither q nor P nor o, but its products are written as if it had: dummy
    outputs keep ptxas from serialising the WGMMAs. They read k and A_v, and nothing reads them.
    """

    def __init__(
        self, K: int, stages: int, P_stages: int, warpgroups: int, dtype: str, output: bool,
        channels: bool,
    ) -> None:  # fmt: skip
        self.k = T.alloc_shared((stages, C, K), dtype)
        self.k_out = T.alloc_shared((stages, C, K), dtype) if channels else self.k
        self.v = T.alloc_shared((stages * warpgroups, C, ROWS), dtype)
        self.A_v = T.alloc_shared((stages, C, C), dtype)
        self.scan_factors = T.alloc_shared((stages, factor_rows(K, channels), C), "float32")
        self.q, self.P = self.k, self.A_v
        if output:
            self.q = T.alloc_shared((stages, C, K), dtype)
            self.P = T.alloc_shared((P_stages, C, C), dtype)
        T.annotate_layout({self.v: make_full_bank_swizzled_layout(self.v)})


@T.macro
def load_chunk(
    q: Any, k: Any, v: Any, P_A_v: Any, scan_factors: Any, decayed_rows: Any, smem: Any,
    inputs_ready: Any, batch: Any, token: Any, slot: Any, head: Any, key_head: Any, row: Any,
    s: Any, has_values: Any, output: bool, channels: bool,
) -> None:  # fmt: skip
    """Load a chunk to stage s, except P, by one warp; v only if has_values."""
    if channels:
        for n, to in ((K_IN, smem.k), (K_OUT, smem.k_out)):
            T.tma_copy(
                decayed_rows[slot, head, n, :, :], to[s, :, :], barrier=inputs_ready[s],
                leader_scope_threads=32,
            )  # fmt: skip
    else:
        T.tma_copy(
            k[batch, token : token + C, key_head, :], smem.k[s, :, :], barrier=inputs_ready[s],
            leader_scope_threads=32,
        )  # fmt: skip
    if has_values:
        warpgroups = smem.v.shape[0] // smem.k.shape[0]
        for wg in T.unroll(warpgroups):
            column = row + wg * ROWS
            T.tma_copy(
                v[batch, token : token + C, head, column : column + ROWS],
                smem.v[s * warpgroups + wg, :, :],
                barrier=inputs_ready[s], leader_scope_threads=32,
            )  # fmt: skip
    T.tma_copy(
        P_A_v[slot, head, 1, :, :], smem.A_v[s, :, :], barrier=inputs_ready[s],
        leader_scope_threads=32,
    )  # fmt: skip
    if output and channels:
        T.tma_copy(
            decayed_rows[slot, head, Q_IN, :, :], smem.q[s, :, :], barrier=inputs_ready[s],
            leader_scope_threads=32,
        )  # fmt: skip
    elif output:
        T.tma_copy(
            q[batch, token : token + C, key_head, :], smem.q[s, :, :], barrier=inputs_ready[s],
            leader_scope_threads=32,
        )  # fmt: skip
    T.tma_copy(
        scan_factors[slot, head, :, :], smem.scan_factors[s, :, :], barrier=inputs_ready[s],
        leader_scope_threads=32,
    )  # fmt: skip
    T.barrier_arrive(inputs_ready[s])


@T.macro
def load_P(P_A_v: Any, smem: Any, P_ready: Any, slot: Any, head: Any, p: Any) -> None:
    """Load a chunk's P to stage p of P, by one warp."""
    T.tma_copy(
        P_A_v[slot, head, 0, :, :], smem.P[p, :, :], barrier=P_ready[p], leader_scope_threads=32
    )
    T.barrier_arrive(P_ready[p])
