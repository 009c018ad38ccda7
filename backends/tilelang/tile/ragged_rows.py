"""Rows past the end of a sequence: cleared after a load, left out of a store."""

from __future__ import annotations

from typing import Any

import tilelang.language as T


@T.macro
def clear_past_end(x: Any, live: Any) -> None:
    """Zero x [., C, .] past the end of the sequence: the rows there may hold anything, NaN too."""
    for b, i, j in T.Parallel(*x.shape):
        if i >= live:
            x[b, i, j] = 0


@T.macro
def clear_rows_past_end(xs: Any, s: Any, live: Any) -> None:
    """The same of stage s of several buffers [stages, C, .] of one shape."""
    for i, j in T.Parallel(*xs[0].shape[1:]):
        if i >= live:
            for x in xs:
                x[s, i, j] = 0


@T.macro
def store_row(
    x: Any, s: Any, i: Any, column: Any, to: Any, batch: Any, at: Any, head: Any, first: Any,
    lane: Any,
) -> None:  # fmt: skip
    """64 columns of x[s, i] in shared memory to those from `first` of token `at`, by one warp."""
    for j in T.vectorized(2):
        to[batch, at, head, first + lane * 2 + j] = x[s, i, column + lane * 2 + j]


@T.macro
def store_live_rows(
    x: Any, s: Any, to: Any, batch: Any, at: Any, live: Any, head: Any, first: Any, lane: Any
) -> None:
    """The live rows of x[s], [C, 64] in shared memory, to the tokens from `at` of to [B, L, HV, V],
    by one warp: what copies a whole chunk would write on."""
    for i in T.serial(live):
        store_row(x, s, i, 0, to, batch, at + i, head, first, lane)
