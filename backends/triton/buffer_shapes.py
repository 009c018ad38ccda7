"""Shapes and dtypes of the buffers between stages (see `chunk_buffers.py`)."""

from __future__ import annotations

import torch
import triton

from gdn.problem import CHUNK, Call

from ..common.chunking import piece_slots
from .chunk_buffers import NUM_DECAYED_ROWS, NUM_FACTORS, NUM_MATRICES
from .piece_length import piece_length


def saved_shapes(call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what forward keeps for backward.

    These are `factors` and `matrices` (see `chunk_buffers.py`). If sequences are cut, there follow
    the transfer matrices of the pieces and their initial states (see `combine_pieces.py`).
    """
    (HV, V), K = call.v.shape[2:], call.q.shape[3]
    slots, length = piece_slots(call, CHUNK), piece_length(call)
    shapes = [
        ((slots, HV, NUM_FACTORS.value, CHUNK), torch.float32),
        ((slots, HV, NUM_MATRICES.value, CHUNK, CHUNK), call.q.dtype),
    ]
    if length:
        pieces = piece_slots(call, length)
        shapes += [((pieces, HV, rows, K), torch.float32) for rows in (V + K, V)]
    return shapes


def decayed_shapes(call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of `decayed_rows` and `channel_decays` (see `chunk_buffers.py`); none with
    a decay per head."""
    if not call.per_channel:
        return []
    places, BK = (piece_slots(call, CHUNK), call.v.shape[2]), padded_keys(call)
    return [
        ((*places, NUM_DECAYED_ROWS.value, CHUNK, BK), call.q.dtype),
        ((*places, BK), torch.float32),
    ]


def padded_keys(call: Call) -> int:
    """K padded to a tile. Triton 3.6 reads past the end of tiles narrower than 64 that two
    warpgroups share."""
    return max(64, int(triton.next_power_of_2(call.q.shape[3])))
