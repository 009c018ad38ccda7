"""Shared memory and barriers of `gradients.py`, its chunks, and how its producer warp loads."""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.largest import largest
from ..tile.layout import ROWS
from .factors import Factor

COLUMNS = 64
"""Columns of K of an inter-chunk warpgroup; q, k, S and dS lie in blocks of so many."""


class Dot:
    """Rows of `row_dots`: the inner products of the rows of two matrices [C, K]."""

    DO_S = 0  # q and dO S^T
    R_S = 1  # k and R S^T
    U_DS = 2  # k and U dS^T
    DQ, DK = 3, 4  # q and dQ, k and dK: for the L2 norm


class PairSum:
    """Rows of `pair_row_sums` and `pair_column_sums`: the sums of a matrix [C, C]."""

    R_U = 0  # (R U^T) * N, for the sums of columns times beta
    DO_U = 1  # tril(dO U^T * L) * qk


CHUNK_FIELDS = (
    "batch", "token",  # where its first token is
    "live",  # tokens of the sequence from there on
    "slot", "key_head",
    "chunks_done", "heads_done",  # chunks, and their value heads, that the thread block has done
)  # fmt: skip
"""The `Fields` of the current chunk of a thread block."""


class GradientsSmem:
    """Shared memory of a thread block. A first size of 2 means two buffers: value heads take them
    in turn, or chunks those of `norms`."""

    def __init__(self, K: int, V: int, dtype: str, l2: bool) -> None:
        blocks = K // COLUMNS
        # === loaded, for a chunk ===
        # [C, K], blocks of 64 columns
        self.q, self.k = (T.alloc_shared((blocks, C, COLUMNS), dtype) for _ in range(2))
        # === loaded, for a value head ===
        self.do, self.R = (T.alloc_shared((2, C, V), dtype) for _ in range(2))
        self.U = T.alloc_shared((2, V, C), dtype)  # U^T [V, C]
        # rows: see `Factor`
        self.has_scales, self.first_scales = dtype == "float16", Factor.RV + V // ROWS
        rows = self.first_scales + self.has_scales * (V // ROWS)
        self.factors = T.alloc_shared((2, rows, C), "float32")
        # S^T and dS^T [V, K], blocks of 64 columns
        self.S, self.dS = (T.alloc_shared((blocks, V, COLUMNS), dtype) for _ in range(2))
        # === computed by the intra-chunk warpgroup ===
        # kk and qk, as `put_aside` stores them, then D_ij rk_j, and D_ij rk_i, transposed for dK.
        # Products of normalised rows are at most 1: there float16 has smaller errors.
        self.pairs = T.alloc_shared((2 * C, C), dtype)
        self.D, self.D_t = self.pairs[0:C, :], self.pairs[C : 2 * C, :]
        self.products = "float16" if l2 else dtype
        # scale F_ij rk_j, for dQ, and scale F_ij rq_i, transposed for dK: in the memory of U of the
        # chunk's last value head, if they fit
        self.own_F = None if V == 2 * C else T.alloc_shared((1, 2 * C, C), dtype)
        self.norms = T.alloc_shared((2, 2, C), "float32")  # rq and rk
        # === sums, of which the storing warp computes the gradients of gates and beta ===
        self.row_dots = T.alloc_shared((2, 5, blocks, C), "float32")
        self.pair_row_sums = T.alloc_shared((2, 2, C), "float32")
        self.pair_column_sums = T.alloc_shared((2, 2, 4, C), "float32")  # one row a warp
        self.S_dS = T.alloc_shared((2, 4 * blocks), "float32")  # shares of <S, dS>, one a warp
        self.stage_in_inputs = V >= K  # whether dq and dk fit where U and dO were
        if not self.stage_in_inputs:
            self.staged = T.alloc_shared((2, blocks * C, COLUMNS), dtype)

    def rowsum_RV(self, b: Any, i: Any) -> Any:
        """rowsum(R * V) of token i of the value head in buffer b."""
        return sum(self.factors[b, row, i] for row in range(Factor.RV, self.first_scales))

    def pair_products(self, which: int) -> Any:
        """Address of kk (which = 0) or qk (1)."""
        return T.address_of(self.pairs[which * C, 0])

    def F_tile(self, which: int, b: Any) -> Any:
        """The tile of F for dQ (which = 0) or dK (1). b: buffer of the chunk's last value head."""
        tiles, first = (self.U, b) if self.own_F is None else (self.own_F, 0)
        return tiles[first, which * C : (which + 1) * C, :]

    def staging(self, which: int, b: Any, h: Any) -> tuple[Any, Any, Any, Any]:
        """Where block h of dq (which = 0) or dk (1), [C, 64], is staged for the storing warp: a
        buffer and the indices of the first element. It is the memory of U and dO of the chunk's
        last value head (in buffer b) or, if those are too small, memory of its own."""
        if not self.stage_in_inputs:
            return self.staged, which, h * C, 0
        return (self.do, b, 0, h * COLUMNS) if which else (self.U, b, h * C, 0)


def row_scale(smem: GradientsSmem, b: Any, row: Any) -> Any:
    """The scale of a row of S^T and U^T of the value head in buffer b."""
    return smem.factors[b, smem.first_scales + row // C, row % C]


@T.macro
def largest_scale(smem: Any, b: Any) -> Any:
    """The largest `row_scale` of the value head in buffer b; by whole warps."""
    found = T.alloc_var("float32")
    found = 1.0
    for row in T.unroll(smem.factors.shape[1] - smem.first_scales):
        found = T.max(found, largest(T.address_of(smem.factors[b, smem.first_scales + row, 0])))
    return found


@T.macro
def find_largest_scales(smem: Any, frag: Any, b: Any) -> None:
    """largest_scales: of the value head in buffer b, and of the chunk's value heads so far."""
    frag.largest_scales[0] = largest_scale(smem, b)
    frag.largest_scales[1] = T.max(frag.largest_scales[0], frag.largest_scales[1])


class Barriers:
    """Barriers, with the number of threads that arrive. [2]: one a buffer of a value head."""

    def __init__(self, inter: int) -> None:
        """inter: threads of the inter-chunk warpgroups. readers: also those of the intra-chunk
        warpgroup and the dv warps."""
        self.qk_ready, self.S_ready, self.dS_ready = (T.alloc_barrier(32) for _ in range(3))
        self.qk_free, self.dq_dk_ready = (T.alloc_barrier(inter) for _ in range(2))
        self.dq_dk_free = T.alloc_barrier(32)  # dq and dk are in memory
        # U of the chunk's last value head has been read, and its memory is free for the tiles of F
        self.tiles_free = T.alloc_barrier(inter)
        self.tokens_ready = T.alloc_barrier([32] * 2)  # dO, R, U and the factors
        self.S_free, self.dS_free = (T.alloc_barrier(inter) for _ in range(2))
        readers = inter + 128 + 64
        self.tokens_free, self.sums_ready = (T.alloc_barrier([readers] * 2) for _ in range(2))
        self.sums_free = T.alloc_barrier([32] * 2)  # and the factors and staged dq, dk


@T.macro
def load_tokens(
    do: Any, R: Any, G_beta: Any, norms: Any, rowsum_RV: Any, U: Any, row_scales: Any, smem: Any,
    bars: Any, b: Any, batch: Any, token: Any, slot: Any, head: Any, key_head: Any,
) -> None:  # fmt: skip
    """Load dO, R, U and the factors of a value head into buffer b; by one warp."""
    for source, target in (
        (do[batch, token : token + C, head, :], smem.do[b, :, :]),
        (R[batch, token : token + C, head, :], smem.R[b, :, :]),
        (U[slot, head, :, :], smem.U[b, :, :]),
        (G_beta[slot, head, :, :], smem.factors[b, Factor.G_BETA, :]),
        (norms[slot, key_head, :, :], smem.factors[b, Factor.NORMS, :]),
        (rowsum_RV[slot, head, :, :], smem.factors[b, Factor.RV : smem.first_scales, :]),
    ):
        T.tma_copy(source, target, barrier=bars.tokens_ready[b], leader_scope_threads=32)
    if smem.has_scales:
        T.tma_copy(
            row_scales[slot, head, :, :], smem.factors[b, smem.first_scales :, :],
            barrier=bars.tokens_ready[b], leader_scope_threads=32,
        )  # fmt: skip
    T.barrier_arrive(bars.tokens_ready[b])


@T.macro
def load_rows(x: Any, to: Any, ready: Any, batch: Any, token: Any, head: Any) -> None:
    """Load a chunk's rows of a head, block by block; by one warp, which arrives later."""
    for b in T.unroll(to.shape[0]):
        T.tma_copy(
            x[batch, token : token + C, head, b * COLUMNS : b * COLUMNS + COLUMNS],
            to[b, :, :], barrier=ready, leader_scope_threads=32,
        )  # fmt: skip


@T.macro
def load_state(x: Any, to: Any, ready: Any, slot: Any, head: Any) -> None:
    """Load S^T or dS^T, block by block; by one warp."""
    for b in T.unroll(to.shape[0]):
        T.tma_copy(
            x[slot, head, :, b * COLUMNS : b * COLUMNS + COLUMNS],
            to[b, :, :], barrier=ready, leader_scope_threads=32,
        )  # fmt: skip
    T.barrier_arrive(ready)


@T.macro
def locate_chunk(number: Any, chunk_spans: Any, L: Any, H: Any, chunk: Any, varlen: bool) -> None:
    """Find the chunk and q/k head with this number: write `CHUNK_FIELDS` up to key_head."""
    chunk["slot"] = T.truncdiv(number, H)
    slot, each = chunk.slot, T.ceildiv(L, C)
    chunk["key_head"] = number - slot * H
    chunk["batch"] = 0 if varlen else T.truncdiv(slot, each)
    chunk["token"] = chunk_spans[slot, 0] if varlen else (slot - chunk.batch * each) * C
    chunk["live"] = chunk_spans[slot, 1] if varlen else L - chunk.token
