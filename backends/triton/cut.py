"""How sequences are cut into pieces, from shapes alone. `tiles.py` says how pieces are numbered."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gdn.problem import CHUNK, Call

LEAST = 8
"""Chunks of a piece, at least, where the pieces of a sequence are walked in parallel."""
BLOCK = 64
"""Columns of V, and of K, of which such a walk runs a program."""


def pieces(call: Call, length: int) -> int:
    """How many numbers the pieces of `length` tokens take."""
    B, T = call.q.shape[:2]
    return T // length + call.sequences if call.cu_seqlens is not None else B * -(-T // length)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have on a GPU; an H200's where there is none."""
    if device.type != "cuda":
        return 232_448
    properties: Any = torch.cuda.get_device_properties(device)  # not all in torch's annotations
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H200 where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def parallel_length(call: Call) -> int | None:
    """Tokens of a piece if walking the pieces of each sequence at the same time pays, else None.

    It walks twice, once for what each piece does to the state; so it pays where less than a third
    of the multiprocessors would have a sequence, head and block of V to walk.
    """
    (_, T, _, K), (HV, V) = call.q.shape, call.v.shape[2:]
    if K not in (64, 128) or V % BLOCK:
        return None
    walks = call.sequences * HV * (V // BLOCK)
    if not walks:
        return None
    each = processors(call.q.device) // walks
    tokens = T if call.cu_seqlens is None else T // call.sequences
    chunks = max(LEAST, -(-tokens // (CHUNK * max(each, 1))))
    return chunks * CHUNK if each >= 3 and tokens >= 3 * chunks * CHUNK else None
