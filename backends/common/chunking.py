"""How a kernel backend cuts sequences into pieces, chunks or longer ones, from shapes alone.

Piece i of sequence n has the number cu_seqlens[n] // length + n + i, for chunks and for longer
pieces: in packed input some numbers stay unused, and nobody needs a table or has to read cu_seqlens
back.
"""

from __future__ import annotations

import functools

import torch

from gdn.problem import CHUNK, Call

LEAST = 8
"""Chunks of a piece, at least, where the pieces of a sequence are walked at the same time."""


def piece_slots(call: Call, length: int) -> int:
    """How many numbers the pieces of `length` tokens take."""
    B, T = call.q.shape[:2]
    return T // length + call.sequences if call.cu_seqlens is not None else B * -(-T // length)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H200 where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def piece_length(call: Call, rows: int) -> int | None:
    """Tokens of a piece if walking the pieces of each sequence at the same time pays, else None.

    Each is walked twice, once for what it does to the state; so it pays where less than a third of
    the multiprocessors would have a sequence, head and `rows` columns of V to walk. Of packed
    sequences one may have nearly all tokens: there, where less than half of them would.
    """
    T, (HV, V) = call.q.shape[1], call.v.shape[2:]
    heads, packed = HV * (V // rows), call.cu_seqlens is not None
    walks, available = call.sequences * heads, sm_count(call.q.device)
    if not walks or (packed and 2 * walks > available):
        return None
    each = available // (heads if packed else walks)
    chunks = max(LEAST, -(-T // (CHUNK * max(each, 1))))
    tokens, least = (T // call.sequences, 2) if packed else (T, 3)
    return chunks * CHUNK if each >= 3 and tokens >= least * chunks * CHUNK else None
