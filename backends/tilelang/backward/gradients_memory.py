"""Where `gradients.py` keeps a chunk, and what tells its warps when it is there."""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.layout import ROWS
from .gradients_inter import COLUMNS

BATCH, AT, LIVE, SLOT, KEY_HEAD, DONE, HEADS = range(7)
"""Rows of `place`: where the chunk is, how many tokens of its sequence there are from its first one
on, and how many chunks and value heads the program is done with."""


class Memory:
    """Shared memory: operands in blocks of 64 columns of K; and, for even and odd value heads, what
    is there of tokens and what warpgroups tell each other."""

    def __init__(self, K: int, V: int, dtype: str, l2: bool) -> None:
        blocks = K // COLUMNS
        self.q, self.k = (T.alloc_shared((blocks, C, COLUMNS), dtype) for _ in range(2))
        self.do, self.R = (T.alloc_shared((2, C, V), dtype) for _ in range(2))
        self.U = T.alloc_shared((2, V, C), dtype)
        self.S, self.dS = (T.alloc_shared((blocks, V, COLUMNS), dtype) for _ in range(2))
        # what pairs of tokens owe each other takes the state's place when nobody needs it
        self.tiles = self.S if blocks * V == 4 * C else T.alloc_shared((2, 2 * C, C), dtype)
        self.F_q, self.F_k = self.tiles[0, 0:C, :], self.tiles[0, C : 2 * C, :]
        self.D, self.D_turned = self.tiles[1, 0:C, :], self.tiles[1, C : 2 * C, :]
        # products of normalised rows are not above 1, which float16 has with fewer errors
        products = "float16" if l2 else dtype
        self.kk, self.qk = (T.alloc_shared((C * C,), products) for _ in range(2))
        self.factors = T.alloc_shared((2, 4 + V // ROWS, C), "float32")
        self.norms = T.alloc_shared((2, 2, C), "float32")  # rq and rk, for even and odd chunks
        self.dots = T.alloc_shared((2, 5, blocks, C), "float32")
        self.rows = T.alloc_shared((2, 2, C), "float32")
        self.columns = T.alloc_shared((2, 2, 4, C), "float32")
        self.carried = T.alloc_shared((2, 4 * blocks), "float32")
        self.apart = V >= K  # dq and dk, once they are staged, are in nobody's way

    def out(self, which: int, b: Any, h: Any) -> tuple[Any, Any, Any, Any]:
        """Where [C, 64] of dq (which = 0) or dk wait for their way out, as a buffer and the indices
        of their first element: in the place of U or dO of the chunk's last value head, b, or, where
        those are too small, of what pairs of tokens owed each other."""
        if not self.apart:
            return self.tiles, which, h * C, 0
        return (self.do, b, 0, h * COLUMNS) if which else (self.U, b, h * C, 0)


class Barriers:
    """Of what is loaded, for every chunk or value head, and used up; of what is told, likewise."""

    def __init__(self, columns: int) -> None:
        self.keys, self.before, self.after = (T.alloc_barrier(32) for _ in range(3))
        self.keys_free, self.staged = (T.alloc_barrier(columns) for _ in range(2))
        self.stored = T.alloc_barrier(32)
        # once a chunk; who waited for every group-th phase of before_free would take an earlier one
        # of the same parity for it
        self.tiles_free = T.alloc_barrier(columns)
        self.tokens = T.alloc_barrier([32] * 2)
        self.before_free, self.after_free = (T.alloc_barrier(columns) for _ in range(2))
        everyone = columns + 128 + 64
        self.free, self.told = (T.alloc_barrier([everyone] * 2) for _ in range(2))
        self.used = T.alloc_barrier([32] * 2)


@T.macro
def load_rows(x: Any, into: Any, full: Any, batch: Any, at: Any, kh: Any) -> None:
    """The chunk's rows of q or k, in blocks, by one warp that has yet to arrive."""
    for b in T.unroll(into.shape[0]):
        T.tma_copy(
            x[batch, at : at + C, kh, b * COLUMNS : b * COLUMNS + COLUMNS],
            into[b, :, :], barrier=full, leader_scope_threads=32,
        )  # fmt: skip


@T.macro
def load_state(x: Any, into: Any, full: Any, slot: Any, head: Any) -> None:
    """S or dS, in blocks, by one warp."""
    for b in T.unroll(into.shape[0]):
        T.tma_copy(
            x[slot, head, :, b * COLUMNS : b * COLUMNS + COLUMNS],
            into[b, :, :], barrier=full, leader_scope_threads=32,
        )  # fmt: skip
    T.barrier_arrive(full)


@T.macro
def find_chunk(number: Any, spans: Any, L: Any, H: Any, place: Any, varlen: bool) -> None:
    """The chunk and q/k head with this number."""
    place[SLOT] = T.truncdiv(number, H)
    slot, each = place[SLOT], T.ceildiv(L, C)
    place[KEY_HEAD] = number - slot * H
    place[BATCH] = 0 if varlen else T.truncdiv(slot, each)
    place[AT] = spans[slot, 0] if varlen else (slot - place[BATCH] * each) * C
    place[LIVE] = spans[slot, 1] if varlen else L - place[AT]
