"""Checkpoints: states of a sequence that a scan stores on its way, after whole chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.pool import is_pool_slot
from ..tile.pool_kind import PoolKind
from .scan_step import store_state

PRELUDE = """
// The checkpoint after `next`, its chunk and its column, by a warp; chunk -1 if there is none.
// Checkpoints are ordered by chunk, those of one chunk by column. offsets: of a sequence, whose
// first `before` tokens came earlier, and of which `tokens` are scanned.
template <class Offset>
__device__ __forceinline__ void gdn_next_checkpoint(
    const Offset *offsets, int columns, int before, int tokens, int *next) {
  unsigned chunk = ~0u, column = ~0u;
  for (int c = threadIdx.x % 32; c < columns; c += 32) {
    long long left = static_cast<long long>(offsets[c]) - before;
    if (left <= 0 || left > tokens || left % 64 != 0) continue;
    int at = static_cast<int>(left) / 64 - 1;
    bool later = at > next[0] || (at == next[0] && c > next[1]);
    if (later && static_cast<unsigned>(at) < chunk) chunk = at, column = c;
  }
  unsigned first = __reduce_min_sync(0xffffffff, chunk);
  next[1] = __reduce_min_sync(0xffffffff, chunk == first ? column : ~0u);
  next[0] = first;
}
"""
"""CUDA that goes before kernels with checkpoints."""


@T.macro
def scan_to_checkpoints(
    checkpoints: tuple[Any, ...], kind: PoolKind, n: Any, tokens: Any, frag: Any, head: Any,
    row: Any, v_first: bool, scan_chunk: Callable[..., None], *args: Any,
) -> None:  # fmt: skip
    """Call scan_chunk(chunk, *args) for the chunks of `tokens` tokens of sequence n, and store S
    where an offset asks for it. Each warp searches all offsets once a checkpoint, 32 at a time.

    checkpoints: offsets, places, the states that take them, null_index, and how many tokens of the
    sequence came before these.
    """
    offsets, places, states, null_index, before = checkpoints
    columns = offsets.shape[1]
    asked = T.alloc_local((2,), "int32")  # chunk and column of the next checkpoint
    asked[0] = -1
    asked[1] = -1
    search = (T.address_of(offsets[n, 0]), columns, before, tokens, asked.data)
    T.call_extern("handle", "gdn_next_checkpoint", *search)
    for chunk in T.serial(T.ceildiv(tokens, C)):
        scan_chunk(chunk, *args)
        while asked[0] == chunk:
            T.wait_wgmma(0)
            if bool(kind.places):
                slot = T.cast(places[n, asked[1]], "int64")
                if is_pool_slot(slot, null_index, states.shape[0]):
                    store_state(frag, states, slot, head, row, v_first, pooled=True, keep=True)
            else:
                place = n * columns + asked[1]
                store_state(frag, states, place, head, row, v_first, pooled=True, keep=True)
            T.call_extern("handle", "gdn_next_checkpoint", *search)
