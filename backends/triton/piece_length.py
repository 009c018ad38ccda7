"""When the pieces of sequences are walked in parallel, and the room that a program has."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gdn.problem import Call

from ..common import chunking

BLOCK = 64
"""Columns of V, and of K, of which such a walk runs a program."""


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have on a GPU; an H200's where there is none."""
    if device.type != "cuda":
        return 232_448
    properties: Any = torch.cuda.get_device_properties(device)  # not all in torch's annotations
    return int(properties.shared_memory_per_block_optin)


def piece_length(call: Call) -> int | None:
    """`chunking.piece_length`, for the sizes that `carry.py` takes."""
    K, V = call.q.shape[3], call.v.shape[3]
    return chunking.piece_length(call, BLOCK) if K in (64, 128) and V % BLOCK == 0 else None
