"""What `decay_rows_kernel` leaves for `channel_gradients.py`, which sums gates by it.

gate_parts [slots, HV, PARTS, C, BK]  the parts of g in base 2 (`channel_decay.split`): two in
                                      bfloat16, one in float32 in float32 calls
selectors [NUM_SELECTORS, C, C]       in bfloat16: -|G_i - G_m| of each level, G_i - G_m at
                                      CENTRED_LEVEL, G_i, gamma - G_i, and sums from a token on

WGMMA reads selectors and parts from shared memory. Selectors that a program computed itself would
take its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.problem import CHUNK, Call

from ..common.chunking import piece_slots
from .buffer_shapes import padded_keys
from .channel_decay import CENTRED_LEVEL, LEVELS, select_to_middle, sum_selected
from .tiles import row_entries

CENTRED_SUMS, PREFIX_SUMS, SUFFIX_SUMS, FROM_TOKEN = (
    tl.constexpr(LEVELS.value + i) for i in range(4)
)
NUM_SELECTORS = tl.constexpr(LEVELS.value + 4)


def new_gate_buffers(call: Call) -> tuple[Tensor, Tensor]:
    """selectors and gate_parts."""
    parts, dtype = (1, torch.float32) if call.q.dtype == torch.float32 else (2, torch.bfloat16)
    shape = (piece_slots(call, CHUNK), call.v.shape[2], parts, CHUNK, padded_keys(call))
    selectors = call.q.new_empty((NUM_SELECTORS.value, CHUNK, CHUNK), dtype=torch.bfloat16)
    return selectors, call.q.new_empty(shape, dtype=dtype)


@triton.jit
def store_selectors(selectors, C: tl.constexpr):
    """Write all selectors."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    at = selectors + (i * C + t)
    for level in range(LEVELS):
        selector, behind = select_to_middle(level, C)
        tl.store(at + level * (C * C), selector.to(tl.bfloat16))
        if level == CENTRED_LEVEL:
            selector = tl.where(behind, selector, -selector)
            tl.store(at + CENTRED_SUMS * (C * C), selector.to(tl.bfloat16))
    tl.store(at + PREFIX_SUMS * (C * C), tl.where(t <= i, 1.0, 0.0).to(tl.bfloat16))
    tl.store(at + SUFFIX_SUMS * (C * C), tl.where(t > i, 1.0, 0.0).to(tl.bfloat16))
    tl.store(at + FROM_TOKEN * (C * C), tl.where(t >= i, 1.0, 0.0).to(tl.bfloat16))


@triton.jit
def sum_by(selectors, which, high, low, C: tl.constexpr, dtype: tl.constexpr):
    """`sum_selected` by selector number `which`."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return sum_selected(tl.load(selectors + which * (C * C) + (i * C + t)), high, low, dtype)


@triton.jit
def part_entries(
    gate_parts, chunk_head, first_channel, C: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Pointers to BD channels of the parts, [C, BD] each."""
    PARTS: tl.constexpr = 1 if dtype == tl.float32 else 2
    first = row_entries(gate_parts, chunk_head * PARTS, first_channel, C, BK, BD)
    return first, first + (PARTS - 1) * (C * BK)
