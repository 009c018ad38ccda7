"""States in the slots of a pool: where a scan begins, where it ends, and checkpoints on the way.

A pool is [slots, HV, V, K] if V_FIRST, else [slots, HV, K, V], a slot every slot_stride elements,
in float32, bfloat16 or float16. Registers hold S^T [BV, BK] in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import compute_state_offsets, round_to

POOL_COUNTS = ("null_index", "slots", "index_stride", "checkpoint_columns")
"""Sizes like `COUNTS` in `indexing.py`."""


@triton.jit
def find_slot(n, indices, fresh, null_index, slots, index_stride, has_tokens):
    """The slot of sequence n; whether the sequence is live, that is, its slot is in the pool and
    not null_index; and whether it reads and writes its slot."""
    slot = n
    if indices is not None:
        slot = tl.load(indices + n * index_stride).to(tl.int64)
    live = (slot != null_index) & (slot >= 0) & (slot < slots)
    reads = live & has_tokens
    writes = reads
    if fresh is not None:
        is_fresh = tl.load(fresh + n) != 0
        reads = reads & (is_fresh == 0)
        writes = live & (has_tokens | is_fresh)
    return slot, live, reads, writes


@triton.jit
def load_from_slot(
    pool, slot, slot_stride, head, first_v, reads, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, V_FIRST: tl.constexpr,
):  # fmt: skip
    """A head's S^T [BV, BK] from first_v of V; zero unless the sequence reads its slot."""
    offsets, mask = compute_state_offsets(head, first_v, K, V, BK, BV, V_FIRST)
    states = tl.load(pool + slot * slot_stride + offsets, mask=mask & reads, other=0.0)
    return states.to(tl.float32)


@triton.jit
def store_to_slot(
    pool, S_T, slot, slot_stride, head, first_v, writes, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, V_FIRST: tl.constexpr,
):  # fmt: skip
    """Store S^T where `load_from_slot` reads, if the sequence writes its slot."""
    offsets, mask = compute_state_offsets(head, first_v, K, V, BK, BV, V_FIRST)
    rounded = round_to(S_T, pool.dtype.element_ty)
    tl.store(pool + slot * slot_stride + offsets, rounded, mask=mask & writes)


@triton.jit
def next_checkpoint(
    begin, end, before, n, checkpoint_offsets, checkpoint_columns, COLUMNS: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The first chunk after `begin` that a checkpoint of sequence n precedes, at most `end`. Chunks
    count from token `before` of the sequence."""
    column = tl.arange(0, COLUMNS)
    offsets = tl.load(
        checkpoint_offsets + n * checkpoint_columns + column, mask=column < checkpoint_columns,
        other=0,
    ).to(tl.int64)  # fmt: skip
    tokens = offsets - before
    lies_ahead = (offsets % C == 0) & (tokens > begin * C) & (tokens < end * C)
    return tl.min(tl.where(lies_ahead, tokens // C, end)).to(tl.int32)


@triton.jit
def store_checkpoints(
    S_T, done, n, checkpoint_offsets, checkpoint_indices, checkpoints, pool, null_index, slots,
    slot_stride, checkpoint_columns, head, first_v,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    V_FIRST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store S^T, the state after `done` tokens of sequence n, wherever an offset asks for it: in
    the buffer `checkpoints` [N, columns, HV, ...], or without one in the pool."""
    column = tl.arange(0, COLUMNS)
    row = n * checkpoint_columns
    offsets = tl.load(
        checkpoint_offsets + row + column, mask=column < checkpoint_columns, other=0
    ).to(tl.int64)
    asks = (offsets == done).to(tl.int32)
    for _ in range(tl.sum(asks)):
        first = tl.min(tl.where(asks != 0, column, COLUMNS))
        if checkpoints is not None:
            store_to_slot(
                checkpoints, S_T, row + first, HV * K * V, head, first_v, first >= 0, K, V, BK, BV,
                V_FIRST,
            )  # fmt: skip
        else:
            slot = tl.load(checkpoint_indices + row + first).to(tl.int64)
            named = (slot != null_index) & (slot >= 0) & (slot < slots)
            store_to_slot(pool, S_T, slot, slot_stride, head, first_v, named, K, V, BK, BV, V_FIRST)
        asks = tl.where(column == first, 0, asks)
