"""Sequences cut into pieces, on the device: packed ones by tables, without reading cu_seqlens."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from gdn.problem import CHUNK, Call

LEAST = 8
"""Chunks of a piece, at least, where sequences are walked in parallel."""
BLOCK = 64
"""Columns of V, and of K, of which such a walk runs a program."""


class Cut(NamedTuple):
    """Every sequence cut each `length` tokens, and the pieces numbered.

    `total` is exact for dense input, an upper bound for packed: pieces past the end are empty.
    """

    length: int
    total: int
    each: int  # pieces of a dense sequence
    sequence: Tensor | None  # [total], the sequence of each piece
    index: Tensor | None  # [total], its number within that; past the last one if empty
    first: Tensor | None  # [N], the first piece of each sequence


def pieces(call: Call, length: int) -> int:
    """`Cut.total`, from shapes alone."""
    B, T = call.q.shape[:2]
    return T // length + call.sequences if call.cu_seqlens is not None else B * -(-T // length)


def cut(call: Call, length: int) -> Cut:
    """All sequences of a call, cut each `length` tokens."""
    total, each = pieces(call, length), -(-call.q.shape[1] // length)
    if call.cu_seqlens is None:
        return Cut(length, total, each, None, None, None)
    counts = (call.cu_seqlens.diff() + length - 1) // length
    ends = counts.cumsum(0)
    numbers = torch.arange(total, device=ends.device)
    sequence = torch.searchsorted(ends, numbers, right=True).clamp_(max=call.sequences - 1)
    first = ends - counts
    return Cut(length, total, each, sequence, numbers - first[sequence], first)


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
    each = processors(call.q.device) // walks
    tokens = T if call.cu_seqlens is None else T // call.sequences
    chunks = max(LEAST, -(-tokens // (CHUNK * max(each, 1))))
    return chunks * CHUNK if each >= 3 and tokens >= 3 * chunks * CHUNK else None
