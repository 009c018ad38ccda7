"""What a thread block of `fused.py` scans, and its shared memory."""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..tile.indexing import START, STOP, piece_bounds
from ..tile.layout import ROWS
from .block_inverse import BlockInverseSmem

STAGES = 3
HEAD, KEY_HEAD, CHUNKS, LAST = range(4, 8)
"""What a thread block scans, in shared memory, after what `piece_bounds` finds. LAST: live tokens
of the last chunk."""


class FusedSmem:
    """Shared memory: a ring of stages, a chunk each. o takes the place of v."""

    def __init__(self, K: int, dtype: str, parts: int) -> None:
        self.q, self.k = (T.alloc_shared((STAGES, C, K), dtype) for _ in range(2))
        self.v = T.alloc_shared((STAGES * 2, C, ROWS), dtype)
        self.P, self.A_v = (T.alloc_shared((STAGES, C, C), dtype) for _ in range(2))
        self.tokens = T.alloc_shared((STAGES, 8, C), "float32")
        self.scan_factors = T.alloc_shared((STAGES, 4, C), "float32")
        self.gates = T.alloc_shared((1, 2, C), "float32")
        self.inverse = BlockInverseSmem(parts, 2)  # a warp may be one chunk ahead of another
        self.key_squares = T.alloc_shared((C,), "float32")
        swizzled = (self.v, self.P, self.A_v)
        T.annotate_layout({x: make_full_bank_swizzled_layout(x) for x in swizzled})


@T.macro
def find_task(
    task: Any, cta: Any, cu_seqlens: Any, sequences: Any, L: Any, H: Any, HV: Any, varlen: bool
) -> None:
    """Fill `task`; by one thread."""
    place = T.alloc_local((4,), "int32")
    piece_bounds(cta // HV, cu_seqlens, sequences, L, L, place, varlen, False)
    for i in T.unroll(4):
        task[i] = place[i]
    task[HEAD] = cta % HV
    task[KEY_HEAD] = cta % HV // (HV // H)
    tokens = T.max(place[STOP] - place[START], 0)
    task[CHUNKS] = T.ceildiv(tokens, C)
    task[LAST] = tokens - (T.ceildiv(tokens, C) - 1) * C
