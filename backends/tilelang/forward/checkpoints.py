"""Checkpoints: states of a sequence that a scan stores on its way, after whole chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.pool import is_pool_slot
from ..tile.pool_kind import PoolKind
from .scan_step import store_state


@T.macro
def scan_to_checkpoints(
    checkpoints: tuple[Any, ...], kind: PoolKind, n: Any, tokens: Any, frag: Any, head: Any,
    row: Any, v_first: bool, scan_chunk: Callable[..., None], *args: Any,
) -> None:  # fmt: skip
    """Call scan_chunk(chunk, *args) for the chunks of `tokens` tokens of sequence n, and store S
    where an offset asks for it.

    checkpoints: offsets, places, the states that take them, null_index, and how many tokens of the
    sequence came before these.
    """
    offsets, places, states, null_index, before = checkpoints
    columns = offsets.shape[1]
    asked = T.alloc_var("int32")  # the next chunk that S is stored after
    asked = -1
    for chunk in T.serial(T.ceildiv(tokens, C)):
        if asked < chunk:
            asked = T.ceildiv(tokens, C)
            for c in T.serial(columns):
                left = T.cast(offsets[n, c], "int64") - before
                whole = T.truncmod(left, T.int64(C)) == 0
                if T.And(whole, T.And(left > chunk * C, left <= asked * C)):
                    asked = T.cast(left, "int32") // C - 1
        scan_chunk(chunk, *args)
        if chunk == asked:
            T.wait_wgmma(0)
            for c in T.serial(columns):
                left = T.cast(offsets[n, c], "int64") - before
                if T.And(left == (chunk + 1) * C, left <= tokens):
                    if bool(kind.places):
                        slot = T.cast(places[n, c], "int64")
                        if is_pool_slot(slot, null_index, states.shape[0]):
                            store_state(frag, states, slot, head, row, v_first, keep=True)
                    else:
                        store_state(frag, states, n * columns + c, head, row, v_first, keep=True)
