"""Where the tokens of a chunk lie, and its gates and their sums.

    g = -exp(A_log) softplus(g_raw + dt_bias), beta = c sigmoid(beta_raw)    where fused
    G = cumsum(g) / ln 2 within the chunk

Past the end of the sequence g and beta are 0, so that G stays at its last value.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from .constants import BETA, LOG2_E, G

WEAK = 0.0625
"""Where beta is not larger, nothing is divided by it."""


def rolled(count: Any) -> Any:
    """A loop that nvcc does not unroll: multiprocessors keep little code at hand."""
    return T.unroll(count, annotations={"pragma_unroll_factor": 1})


class Pace:
    """What keeps the programs of neighbouring columns of V, a cluster, a chunk apart at most: their
    halves of a token's row then come from memory together."""

    def __init__(self, programs: int) -> None:
        self.programs = programs
        if programs > 1:
            self.ready = T.alloc_cluster_barrier(programs)


@T.macro
def keep_pace(pace: Any, chunk: Any, leads: Any) -> None:
    """Until all of them may load the chunk, by the warps that load; leads: one thread of each."""
    if pace.programs > 1:
        if leads:
            for program in T.unroll(pace.programs):
                T.mbarrier_arrive(pace.ready[0], program)
        T.barrier_wait(pace.ready[0], chunk % 2)
        T.sync_warp()  # or the one who leads is two phases on before all have seen this one


@T.macro
def locate(
    number: Any, cu_seqlens: Any, sequences: Any, length: Any, size: Any, place: Any, varlen: bool
) -> None:
    """place = sequence, first token and tokens left (0 or less: not in use) of the piece of `size`
    tokens that has this number (see `cut.py`)."""
    if varlen:
        low = T.alloc_local((1,), "int32")
        high = T.alloc_local((1,), "int32")
        low[0] = 0
        high[0] = sequences
        while high[0] - low[0] > 1:
            middle = (low[0] + high[0]) // 2
            if T.cast(cu_seqlens[middle], "int32") // size + middle <= number:
                low[0] = middle
            else:
                high[0] = middle
        start = T.cast(cu_seqlens[low[0]], "int32")
        place[0] = low[0]
        place[1] = start + (number - start // size - low[0]) * size
        place[2] = T.cast(cu_seqlens[low[0] + 1], "int32") - place[1]
    else:
        each = T.ceildiv(length, size)
        place[0] = number // each
        place[1] = number % each * size
        place[2] = length - place[1]


@T.macro
def span(
    piece: Any, cu_seqlens: Any, sequences: Any, L: Any, length: Any, place: Any,
    varlen: bool, cut: bool,
) -> None:  # fmt: skip
    """place = sequence, first token, end, and number of the first chunk of a piece of at most
    `length` tokens, or (not cut) of a whole sequence. Not in use: the end comes first."""
    if cut:
        locate(piece, cu_seqlens, sequences, L, length, place, varlen)
        place[2] = place[1] + T.min(place[2], length)
    else:
        place[0] = piece
        place[1] = T.cast(cu_seqlens[piece], "int32") if varlen else 0
        place[2] = T.cast(cu_seqlens[piece + 1], "int32") if varlen else L
    if varlen:
        before = T.cast(cu_seqlens[place[0]], "int32")
        place[3] = before // C + place[0] + (place[1] - before) // C
    else:
        place[3] = place[0] * T.ceildiv(L, C) + place[1] // C


@T.macro
def number_within(cu_seqlens: Any, L: Any, length: Any, place: Any, varlen: bool) -> None:
    """place[7] = which piece of its sequence `span` found, place[8] = which is the last."""
    before = T.cast(cu_seqlens[place[0]], "int32") if varlen else 0
    after = T.cast(cu_seqlens[place[0] + 1], "int32") if varlen else L
    place[7] = (place[1] - before) // length
    place[8] = T.max(T.ceildiv(after - before, length) - 1, 0)


@T.macro
def clear_dead(x: Any, live: Any) -> None:
    """Zero x [., C, .] past the end of the sequence: the rows there may hold anything, NaN too."""
    for b, i, j in T.Parallel(*x.shape):
        if i >= live:
            x[b, i, j] = 0


@T.macro
def clear_rows(xs: Any, s: Any, live: Any) -> None:
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
def store_live(
    x: Any, s: Any, to: Any, batch: Any, at: Any, live: Any, head: Any, first: Any, lane: Any
) -> None:
    """The live rows of x[s], [C, 64] in shared memory, to the tokens from `at` of to [B, L, HV, V],
    by one warp: what copies a whole chunk would write on."""
    for i in T.serial(live):
        store_row(x, s, i, 0, to, batch, at + i, head, first, lane)


def kept(beta: Any) -> Any:
    """What backward's R is multiplied by before it goes through memory: beta, which makes it dv,
    unless that is too weak to be divided by again."""
    return T.if_then_else(beta > WEAK, beta, 1.0)


def left(beta: Any) -> Any:
    """What is left of beta to multiply `kept` R by."""
    return T.if_then_else(beta > WEAK, 1.0, beta)


def softplus(x: Any, y: Any) -> Any:
    """log(1 + e^x), given y = e^-|x|; exact for large and for very negative x."""
    return T.max(x, 0.0) + T.if_then_else(y < 1e-4, y - y * y / 2, T.log(1 + y))


@T.macro
def load_gates(
    g: Any, beta: Any, A_log: Any, dt_bias: Any, batch: Any, head: Any, at: Any, live: Any,
    raw: Any, lane: Any, gate: bool, bias: bool,
) -> None:  # fmt: skip
    """raw = g and beta of the `live` tokens from `at`, two a lane of one warp; A_log, dt_bias."""
    for i in T.unroll(2):
        raw[i] = 0.0
        raw[2 + i] = 0.0
        if lane * 2 + i < live:
            raw[i] = T.cast(g[batch, at + lane * 2 + i, head], "float32")
            raw[2 + i] = T.cast(beta[batch, at + lane * 2 + i, head], "float32")
    if gate:
        raw[4] = A_log[head]
        if bias:
            raw[5] = dt_bias[head]


@T.macro
def sum_gates(
    raw: Any, live: Any, gates: Any, b: Any, lane: Any, gate: bool, bias: bool, sigmoid: bool,
    double: bool,
) -> None:  # fmt: skip
    """Rows G and BETA of gates[b], of what `load_gates` has loaded."""
    step = T.alloc_local((2,), "float32")
    written = T.alloc_local((2,), "float32")
    y = T.alloc_local((1,), "float32")
    for i in T.unroll(2):
        step[i] = raw[i]
        written[i] = raw[2 + i]
        if gate:
            if bias:
                step[i] += raw[5]
            y[0] = T.exp(-T.abs(step[i]))
            step[i] = -T.exp(raw[4]) * softplus(step[i], y[0])
        if sigmoid:
            written[i] = (2.0 if double else 1.0) / (1.0 + T.exp(-written[i]))
        if lane * 2 + i >= live:
            step[i] = 0.0
            written[i] = 0.0
    total = T.alloc_local((1,), "float32")
    other = T.alloc_local((1,), "float32")
    for i in T.unroll(2):
        step[i] *= LOG2_E
    total[0] = step[0] + step[1]
    for power in T.unroll(5):
        other[0] = T.shfl_up(total[0], 1 << power)
        if lane >= (1 << power):
            total[0] += other[0]
    other[0] = T.shfl_up(total[0], 1)
    if lane == 0:
        other[0] = 0.0
    gates[b, G, lane * 2] = other[0] + step[0]
    gates[b, G, lane * 2 + 1] = total[0]
    for i in T.unroll(2):
        gates[b, BETA, lane * 2 + i] = written[i]
