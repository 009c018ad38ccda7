"""`gdn.backends.common.chunking`. Tensors are on the meta device, which counts as a GPU with 132
SMs."""

from __future__ import annotations

import pytest
import torch
from gdn.backends.common.chunking import piece_length, piece_slots
from torch import Tensor

from gdn.problem import Call


def call(B: int, T: int, HV: int, sequences: int | None) -> Call:
    """A call of tensors without data, V = 128. With `sequences` it is packed."""

    def x(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    tokens = x(B, T, HV, 128), x(B, T, HV, 128), x(B, T, HV, 128), x(B, T, HV), x(B, T, HV)
    return Call(*tokens, cu_seqlens=None if sequences is None else x(sequences + 1))


@pytest.mark.parametrize(
    ("B", "T", "HV", "sequences", "length"),
    [
        (1, 32768, 8, None, 4096),  # 16 scans: eight pieces
        (4, 8192, 8, None, None),  # 64 scans: more than a third of the SMs
        (1, 32768, 32, None, None),
        (1, 2048, 8, None, 512),  # pieces have at least 8 chunks
        (1, 1024, 8, None, None),
        (1, 32768, 16, 2, 8192),  # cut as if one sequence had all tokens
        (1, 32768, 8, 8, None),  # 128 scans fill the GPU
        (1, 32768, 32, 2, None),
        (1, 800, 2, 3, None),
        (1, 0, 8, 1, None),
        (0, 64, 8, None, None),
    ],
)
def test_sequences_are_cut_where_the_gpu_would_be_idle(
    B: int, T: int, HV: int, sequences: int | None, length: int | None
) -> None:
    assert piece_length(call(B, T, HV, sequences), 64) == length


def test_every_chunk_has_its_own_slot() -> None:
    assert piece_slots(call(3, 130, 2, None), 64) == 9
    cu_seqlens = [0, 1, 1, 130, 200]
    slots = [
        cu_seqlens[n] // 64 + n + i
        for n in range(4)
        for i in range(-(-(cu_seqlens[n + 1] - cu_seqlens[n]) // 64))
    ]
    assert len(set(slots)) == len(slots)
    assert max(slots) < piece_slots(call(1, 200, 2, 4), 64)
