"""The states between the pieces of a sequence that is walked in parallel, a program a sequence,
value head and block of V.

    S <- M S + N over the pieces, in order             forward
    dS <- M^T dS + N, from the last to the first       backward (REVERSE)

where a piece leaves N from a zero state, and M takes the state before it to what that leaves after
it. Reads M^T and N^T as `scan.py` writes them, one under the other, [pieces, HV, V + K, K] (in
backward N^T is [pieces, HV, V, K]); writes the state that each piece begins with, [V, K], and the
last one. Everything is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, tile_offsets


@triton.jit
def carry_kernel(
    walked, own, initial, begins, final, cu_seqlens, each, LENGTH,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, V_FIRST: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = V // BV
    sequence_head, first = program // blocks, (program % blocks) * BV
    n, head = sequence_head // HV, sequence_head % HV
    piece, count = n * each, each
    if VARLEN:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        piece = start // (LENGTH * C) + n
        tokens = tl.load(cu_seqlens + n + 1) - start
        count = tl.cdiv(tokens, LENGTH * C).to(tl.int32)
    at, _ = tile_offsets(sequence_head, first, K, V, K, BV, V_FIRST)
    S = tl.zeros([BV, K], tl.float32)
    if INITIAL:
        S = tl.load(initial + at).to(tl.float32)
    row, column = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    for step in range(count):
        here = (piece + (count - 1 - step if REVERSE else step)) * HV + head
        begin, _ = tile_offsets(here, first, K, V, K, BV, True)
        tl.store(begins + begin, S)
        M = walked + here * ((V + K) * K) + V * K
        inner = column * K + row if REVERSE else row * K + column
        kept, _ = tile_offsets(here, first, K, V if REVERSE else V + K, K, BV, True)
        S = dot(S, tl.load(M + inner)) + tl.load(own + kept)
    if FINAL:
        tl.store(final + at, S)
