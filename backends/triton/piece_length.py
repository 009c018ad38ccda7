"""Whether the Triton kernels cut the sequences of a call into pieces."""

from __future__ import annotations

from gdn.problem import Call

from ..common import chunking

PIECE_BLOCK_V = 64
"""Columns of V a program where pieces are scanned. The transfer scan has K more columns."""


def piece_length(call: Call) -> int | None:
    """Tokens of a piece, or None for whole sequences: `chunking.piece_length`, for sizes that
    `scan.py` and `combine_pieces.py` can cut."""
    K, V = call.q.shape[3], call.v.shape[3]
    if K not in (64, 128) or V % PIECE_BLOCK_V:
        return None
    return chunking.piece_length(call, PIECE_BLOCK_V)
