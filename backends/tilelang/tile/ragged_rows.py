"""Rows past the end of a sequence: cleared after a load, left out of a store.

A copy of a whole chunk also brings rows of the next sequence, or of no tensor. `live` is the number
of rows that belong to the sequence; it may exceed C.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from .indexing import rolled_loop


@T.macro
def clear_past_end(x: Any, live: Any) -> None:
    """Zero the rows past the end of x [., C, .]: they may hold NaN, and 0 times NaN is NaN."""
    for b, i, j in T.Parallel(*x.shape):
        if i >= live:
            x[b, i, j] = 0


@T.macro
def clear_rows_past_end(xs: Any, s: Any, live: Any) -> None:
    """Zero the rows past the end in stage s of several buffers [stages, C, .] of one shape."""
    for i, j in T.Parallel(*xs[0].shape[1:]):
        if i >= live:
            for x in xs:
                x[s, i, j] = 0


@T.macro
def store_row(
    x: Any, s: Any, i: Any, column: Any, to: Any, batch: Any, token: Any, head: Any, first: Any,
    lane: Any,
) -> None:  # fmt: skip
    """Store 64 columns of x[s, i] in shared memory, from `column` on, to the columns of
    to[batch, token, head] from `first` on; by one warp."""
    for j in T.vectorized(2):
        to[batch, token, head, first + lane * 2 + j] = x[s, i, column + lane * 2 + j]


@T.macro
def store_live_rows(
    x: Any, s: Any, to: Any, batch: Any, token: Any, live: Any, head: Any, first: Any, lane: Any
) -> None:
    """Store the live rows of x[s], [C, 64] in shared memory, to the tokens from `token` on of
    to [B, L, HV, V]; by one warp. A copy of the whole chunk would overwrite the next sequence."""
    for i in rolled_loop(T.ceildiv(live, 4)):  # 16 bytes a lane
        row, column = i * 4 + lane // 8, lane % 8 * 8
        if row < live:
            for j in T.vectorized(8):
                to[batch, token + row, head, first + column + j] = x[s, row, column + j]


@T.macro
def store_columns(
    to: Any, x: Any, batch: Any, token: Any, stop: Any, head: Any, first: Any, s: Any, tiles: int,
    lane: Any,
) -> None:  # fmt: skip
    """Store `tiles` tiles [C, 64] of x in shared memory, from number s * tiles on, to a chunk of
    `to` [B, L, HV, V], side by side from column `first` on; by one warp, which waits until they
    have been read. token, stop: the chunk's first token, and the one after the sequence's last."""
    if token + C <= stop:
        for tile in T.unroll(tiles):
            column = first + tile * 64
            T.tma_copy(
                x[s * tiles + tile, :, :],
                to[batch, token : token + C, head, column : column + 64],
                leader_scope_threads=32,
            )
    else:
        for tile in T.unroll(tiles):
            store_live_rows(
                x, s * tiles + tile, to, batch, token, stop - token, head, first + tile * 64, lane
            )
    T.tma_store_wait(0)


@T.macro
def clear_tokens(
    to: Any, batch: Any, start: Any, stop: Any, head: Any, first: Any, width: int, lane: Any
) -> None:
    """Zero `width` columns, from `first` on, of the tokens start to stop of to [B, L, HV, V]; by
    one warp."""
    for token in T.serial(T.max(stop - start, 0)):
        for n in T.unroll(width // 64):
            for j in T.vectorized(2):
                to[batch, start + token, head, first + n * 64 + lane * 2 + j] = 0
