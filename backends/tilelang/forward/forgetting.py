"""Skip the chunks of a piece that decay leaves nothing of.

A token multiplies the state by e^g (I - beta k k^T), whose norm is at most

    e^g max(1, |1 - beta |k|^2|)

so the logarithms of these numbers, summed from a token to the end of a piece, bound what is left of
the state before that token. Where the sum is at most -60, less than 1e-26 is left: a scan for N may
start there, from zero, and M is zero. A NaN in the sum skips nothing.

All warps of a thread block take part. A warp sums a chunk, from the last one on. Only where the
gates alone reach -60 are keys read, if they are not normalised; with the L2 norm |k| <= 1, and the
bound is e^g max(1, |1 - beta|). `fused.py` searches in its transfer scan; for that of `scan.py`,
which has other warps, and for backward the kernels of `first_chunks.py` do.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.gate_math import load_gates, sum_gates
from ..tile.indexing import SEQUENCE, START, STOP
from ..tile.layout import BETA, LOG2_E, G
from ..tile.runs import load_run
from .fused_memory import CHUNKS, FORGETS, HEAD, KEY_HEAD, PIECE

FORGOTTEN = -60 * LOG2_E
"""The sum of log2 of the bounds from which on nothing is left."""
ROWS_AT_ONCE = 4
"""Rows of k that a lane has a part of in registers."""


class ForgettingSmem:
    """Shared memory: the gates of a chunk, and its sum, for each warp."""

    def __init__(self, warps: int) -> None:
        self.gates = T.alloc_shared((warps, 2, C), "float32")
        self.sums = T.alloc_shared((warps,), "float32")


def growth(beta: Any, squares: Any) -> Any:
    """log2 max(1, |1 - beta |k|^2|); NaN stays."""
    factor = T.abs(1 - beta * squares)
    return T.if_then_else(factor <= 1, 0.0, T.log2(factor))


@T.macro
def sum_lanes(x: Any, lanes: int) -> None:
    """x[0], summed over each group of so many lanes of a warp."""
    for power in T.unroll(lanes.bit_length() - 1):
        x[0] += T.shfl_xor(x[0], 1 << power)


def token_of(step: Any, n: int, lane: Any) -> Any:
    """The token whose row a lane has in place n after step `step` of `load_rows`."""
    return (step * ROWS_AT_ONCE + n) * 4 + lane // 8


def channel_of(run: int, i: int, lane: Any) -> Any:
    """The channel of element i of a lane's part of a row; runs of so many follow each other."""
    return (i // run * 8 + lane % 8) * run + i % run


@T.macro
def load_rows(
    x: Any, batch: Any, token: Any, left: Any, head: Any, rows: Any, step: Any, lane: Any
) -> None:
    """A lane's parts of ROWS_AT_ONCE rows of x [B, L, heads, K] to registers; eight lanes read a
    row. Past the `left` tokens of the piece the last row stands in."""
    each, run = x.shape[3] // 8, 128 // x.dtype.bits
    for n in T.unroll(ROWS_AT_ONCE):
        row = T.cast(token + T.min(token_of(step, n, lane), left - 1), "int64")
        for i in T.unroll(each // run):
            at = (batch, row, head, channel_of(run, i * run, lane))
            load_run(rows, n * each + i * run, x, at, run, True)


@T.macro
def sum_growth_of_keys(
    k: Any, batch: Any, token: Any, left: Any, key_head: Any, smem: Any, total: Any, warp: Any,
    lane: Any,
) -> None:  # fmt: skip
    """`sum_growth` of keys that are not normalised. Past the `left` tokens of the piece beta is
    0."""
    K = k.shape[3]
    rows = T.alloc_local((ROWS_AT_ONCE * K // 8,), k.dtype)
    squares = T.alloc_local((1,), "float32")
    for step in T.serial(C // (4 * ROWS_AT_ONCE)):
        load_rows(k, batch, token, left, key_head, rows, step, lane)
        for n in T.unroll(ROWS_AT_ONCE):
            squares[0] = 0.0
            for i in T.unroll(K // 8):
                x = T.cast(rows[n * (K // 8) + i], "float32")
                squares[0] += x * x
            sum_lanes(squares, 8)
            if lane % 8 == 0:
                t = token_of(step, n, lane)
                total[0] += growth(smem.gates[warp, BETA, t], squares[0])


@T.macro
def sum_growth(
    k: Any, batch: Any, token: Any, left: Any, key_head: Any, smem: Any, total: Any, warp: Any,
    lane: Any, l2: bool,
) -> None:  # fmt: skip
    """Add the growth of the 64 tokens from `token` on to total[0], some by each lane."""
    if l2:
        for i in T.unroll(2):
            total[0] += growth(smem.gates[warp, BETA, lane * 2 + i], 1.0)
    else:
        sum_growth_of_keys(k, batch, token, left, key_head, smem, total, warp, lane)


@T.macro
def search(
    task: Any, found: Any, sums: Any, warp: Any, passes: int, reverse: bool, sum_chunk: Any,
    *args: Any,
) -> None:  # fmt: skip
    """Write to found[0] the first chunk of the piece `task` that matters after it; -1 if what was
    before the piece matters too. reverse: chunks are counted from the last one on, and what matters
    is what matters before the piece, to gradients.

    sum_chunk(last, chunk, *args) writes the sum of a chunk of the piece to sums[warp]. Of two
    passes the first one, with last = 0, has sums that are at most as large and quicker to find: the
    second one looks only where it must, and gives up where it needs twice as many chunks."""
    total = T.alloc_var("float32")
    ahead, first, seen = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
    warps = sums.shape[0]
    for last in T.serial(passes):
        ahead = task[CHUNKS]
        seen = 0
        if last == 1:
            seen = T.if_then_else(first < 0, ahead, T.max(ahead - 2 * (ahead - first) - 1, 0))
        first = -1
        total = 0.0
        while T.And(first < 0, ahead > seen):
            chunk = ahead - 1 - warp
            if chunk >= seen:
                sum_chunk(last, task[CHUNKS] - 1 - chunk if reverse else chunk, *args)
            T.sync_threads()
            for i in T.serial(warps):
                if T.And(first < 0, ahead - 1 - i >= seen):
                    total += sums[i]
                    if total <= FORGOTTEN:
                        first = ahead - 1 - i
            ahead -= warps
            T.sync_threads()
    found[0] = first


@T.macro
def sum_bounds(
    keys: Any, chunk: Any, k: Any, g: Any, beta: Any, A_log: Any, dt_bias: Any, smem: Any,
    task: Any, warp: Any, lane: Any, varlen: bool, l2: bool, gate: bool, bias: bool, sigmoid: bool,
    double: bool,
) -> None:  # fmt: skip
    """For `search`: of a chunk, with the growth by its keys, or else by its gates alone (keys = 0
    without the L2 norm)."""
    raw = T.alloc_local((6,), "float32")
    mine = T.alloc_local((1,), "float32")
    batch = 0 if varlen else task[SEQUENCE]
    token = task[START] + chunk * C
    left = task[STOP] - token
    load_gates(g, beta, A_log, dt_bias, batch, task[HEAD], token, left, raw, lane, gate, bias)
    sum_gates(raw, left, smem.gates, warp, lane, gate, bias, sigmoid, double)
    T.sync_warp()
    mine[0] = 0.0
    if T.Or(l2, keys == 1):
        sum_growth(k, batch, token, left, task[KEY_HEAD], smem, mine, warp, lane, l2)
    sum_lanes(mine, 32)
    if lane == 0:
        smem.sums[warp] = smem.gates[warp, G, C - 1] + mine[0]


@T.macro
def find_first_chunk(
    k: Any, g: Any, beta: Any, A_log: Any, dt_bias: Any, smem: Any, task: Any, found: Any,
    warp: Any, lane: Any, varlen: bool, l2: bool, gate: bool, bias: bool, sigmoid: bool,
    double: bool, reverse: bool = False,
) -> None:  # fmt: skip
    """`search`, with a decay per head. Keys are read only if they are not normalised."""
    search(
        task, found, smem.sums, warp, 1 if l2 else 2, reverse, sum_bounds,
        k, g, beta, A_log, dt_bias, smem, task, warp, lane, varlen, l2, gate, bias, sigmoid, double,
    )  # fmt: skip


@T.macro
def skip_forgotten(
    k: Any, g: Any, beta: Any, A_log: Any, dt_bias: Any, forgets: Any, smem: Any, task: Any,
    block: Any, warp: Any, lane: Any, varlen: bool, l2: bool, gate: bool, bias: bool,
    sigmoid: bool, double: bool,
) -> None:  # fmt: skip
    """If the piece forgets, let the scan for N (block 0) begin at the first chunk that matters, and
    leave out the one for M (block 1): write FORGETS, START and CHUNKS of `task`, and `forgets`."""
    found = T.alloc_local((1,), "int32")
    find_first_chunk(
        k, g, beta, A_log, dt_bias, smem, task, found, warp, lane, varlen, l2, gate, bias, sigmoid,
        double,
    )  # fmt: skip
    first = found[0]
    if T.And(T.And(warp == 0, lane == 0), task[CHUNKS] > 0):
        if block == 0:
            forgets[task[PIECE], task[HEAD]] = T.if_then_else(first < 0, 0, 1)
        if first >= 0:
            task[FORGETS] = 1
            task[START] += first * C
            task[CHUNKS] = T.if_then_else(block == 0, task[CHUNKS] - first, 0)
    T.sync_threads()
