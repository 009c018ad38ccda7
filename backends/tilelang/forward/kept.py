"""What one kernel (`fused.py`) keeps for backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import tilelang.language as T

from ..tile.indexing import SLOT
from .fused_memory import HEAD, KEY_HEAD


class Kept(NamedTuple):
    """The norms rq and rk [slots, H, 2, C], and A [slots, HV, C, C]. group: HV / H."""

    norms: Any
    A: Any
    group: Any


def keeps_norms(task: Any, kept: Kept) -> Any:
    """Whether it is this task, of those with the same keys, that keeps their norms."""
    return task[HEAD] == task[KEY_HEAD] * kept.group


def place_of_norms(task: Any, kept: Kept | None, chunk: Any) -> list[Any]:
    """Address of a chunk's rk, and whether this task writes them; nothing if nothing is kept."""
    if kept is None:
        return []
    place = T.address_of(kept.norms[task[SLOT] + chunk, task[KEY_HEAD], 1, 0])
    return [place, keeps_norms(task, kept)]


@T.macro
def store_A(task: Any, kept: Kept, smem: Any, chunk: Any, warp: Any) -> None:
    """Copy A of a chunk to memory, by the first of four warps, after all have written their part.
    `T.tma_store_wait`, by the same warp, tells when the tile may be overwritten."""
    if warp == 0:
        T.tma_copy(
            smem.A[0, :, :], kept.A[task[SLOT] + chunk, task[HEAD], :, :], leader_scope_threads=32
        )
