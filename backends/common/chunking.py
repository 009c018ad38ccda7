"""How kernel backends cut sequences into chunks and pieces, from shapes alone.

A chunk has 64 tokens. A piece has a whole number of chunks, and the pieces of a sequence are
scanned in parallel. The last chunk and the last piece of a sequence may be shorter. Chunk or piece
i of sequence n has its place in the buffers, its slot, at

    cu_seqlens[n] // length + n + i

where `length` is the tokens of a chunk or piece. Packed input leaves some slots unused. In return,
kernels need no index table and the host does not read cu_seqlens.
"""

from __future__ import annotations

import functools

import torch

from gdn.problem import CHUNK, Call

MIN_PIECE_CHUNKS = 8
"""Chunks that a piece has at least."""


def piece_slots(call: Call, length: int) -> int:
    """Number of slots for the pieces (or chunks) of `length` tokens."""
    B, T = call.q.shape[:2]
    return T // length + call.sequences if call.cu_seqlens is not None else B * -(-T // length)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Number of SMs of a GPU. Other devices count as an H200, which has 132."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def piece_length(call: Call, block_v: int) -> int | None:
    """Tokens of a piece if scanning the pieces of each sequence in parallel pays, else None.

    One scan covers a sequence, a value head and `block_v` columns of V, on one SM. Pieces are
    scanned twice: once for their transfer matrices and once for the outputs. So cutting pays where
    scans of whole sequences would occupy at most a third of the SMs.

    The lengths of packed sequences are not known here, and one sequence may hold nearly all tokens.
    So packed input is cut as if one did, where scans would occupy at most half of the SMs.

    Batch-invariant calls are never cut: joining pieces rounds otherwise than scanning on. A rank's
    part of sequences always is, into one piece at least: other ranks need its transfer matrices.
    """
    if call.batch_invariant:
        return None
    always = call.context_parallel
    T, (HV, V) = call.q.shape[1], call.v.shape[2:]
    sequence_scans, packed = HV * (V // block_v), call.cu_seqlens is not None
    scans, sms = call.sequences * sequence_scans, sm_count(call.q.device)
    if not scans or (packed and 2 * scans > sms and not always):
        return None
    pieces = sms // (sequence_scans if packed else scans)  # that one sequence has at most
    chunks = max(MIN_PIECE_CHUNKS, -(-T // (CHUNK * max(pieces, 1))))
    mean_tokens, min_pieces = (T // call.sequences, 2) if packed else (T, 3)
    long_enough = mean_tokens >= min_pieces * chunks * CHUNK
    return chunks * CHUNK if always or (pieces >= 3 and long_enough) else None
