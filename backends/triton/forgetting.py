"""Before the first scans of a rank's part: the chunks of each piece that matter after it, or in
REVERSE before it.

A token multiplies the state by e^g (I - beta k k^T), whose norm is at most

    e^g max(1, |1 - beta |k|^2|)

Where the logarithms of these bounds sum to -60 from a token to the end of a piece, less than 1e-26
of the state before that token is left. The transfer scan may then start at its chunk, from zero,
and M is zero. Gradients are forgotten likewise from the piece's begin on. A NaN in the sum forgets
nothing.

A program takes a piece and a value head. Reads `factors`, and only where the gates alone reach -60
also keys, if their norm is not fused. Writes found [pieces, HV]: the first chunk that matters, -1
where nothing is forgotten; in REVERSE how many chunks matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_buffers import BETA, GATE_SUM, NUM_FACTORS, load_factor, load_gamma
from .indexing import COUNTS, locate_piece, piece_bounds
from .launch import ANY_ALIGNMENT
from .tiles import find_batch_row, load_input_rows

FORGOTTEN = tl.constexpr(-60.0)
AT_ONCE = tl.constexpr(64)
"""Chunks whose gates are summed at once."""


@triton.jit
def sum_growth(
    k, factors, first_token, tokens, chunk_head, qk_head, K: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, L2_NORM: tl.constexpr, K_STRIDES: tl.constexpr,
):  # fmt: skip
    """The sum of log max(1, |1 - beta |k|^2|) over a chunk; with the L2 norm |k| is at most 1."""
    squares = tl.full([C], 1.0, tl.float32)
    if not L2_NORM:
        keys = load_input_rows(k, first_token, tokens, qk_head, K_STRIDES, K, 0, C, BK)  # [C, K]
        keys = keys.to(tl.float32)
        squares = tl.sum(keys * keys, axis=1)
    factor = tl.abs(1 - load_factor(factors, chunk_head, BETA, C) * squares)
    return tl.sum(tl.where(factor <= 1, 0.0, tl.log(factor)), axis=0)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def find_chunks_kernel(
    k, factors, found, cu_seqlens, N, T, chunks_per_sequence, pieces_per_sequence, piece_chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, L2_NORM: tl.constexpr, K_STRIDES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    piece_head = tl.program_id(0).to(tl.int64)
    piece, head = piece_head // HV, piece_head % HV
    n, index = locate_piece(
        piece, cu_seqlens, N, pieces_per_sequence, piece_chunks, VARLEN, True, C
    )  # fmt: skip
    first_token, tokens, slot = piece_bounds(
        n, index, cu_seqlens, T, chunks_per_sequence, piece_chunks, VARLEN, True, C
    )  # fmt: skip
    k = find_batch_row(k, first_token, T, K_STRIDES)
    chunks = ((tokens + C - 1) // C).to(tl.int32)

    # === by the gates alone ===
    total = tl.sum(tl.zeros([1], tl.float32), axis=0)
    left = chunks
    while (left > 0) & (total > FORGOTTEN):
        at = left - 1 - tl.arange(0, AT_ONCE)
        chunk = chunks - 1 - at if REVERSE else at
        gamma = factors + (((slot + chunk) * HV + head) * NUM_FACTORS + GATE_SUM) * C + C - 1
        total += tl.sum(tl.load(gamma, mask=at >= 0, other=0.0), axis=0)
        left -= AT_ONCE

    # === with the keys, twice as far at most ===
    first = left * 0 - 1
    if total <= FORGOTTEN:
        end = tl.maximum(chunks - 2 * (chunks - tl.maximum(left, 0)), 0)
        total = total * 0
        left = chunks
        while (left > end) & (total > FORGOTTEN):
            left -= 1
            chunk = chunks - 1 - left if REVERSE else left
            chunk_head, token = (slot + chunk) * HV + head, first_token + chunk * C
            total += load_gamma(factors, chunk_head, C)
            total += sum_growth(
                k, factors, token, tokens - chunk * C, chunk_head, head // (HV // H), K, BK, C,
                L2_NORM, K_STRIDES,
            )  # fmt: skip
        first = tl.where(total <= FORGOTTEN, left, -1)
    tl.store(found + piece_head, chunks - tl.maximum(first, 0) if REVERSE else first)
