"""What plans say to kernels about a pool of states, without importing tilelang."""

from __future__ import annotations

from typing import Any, NamedTuple


class PoolKind(NamedTuple):
    """What kernels must know of a pool before they are compiled: dtypes of the pool and its tables,
    "" where there is none. fresh: whether sequences may start from zero; offsets: of
    checkpoint_offsets; places: of checkpoint_indices, "" if checkpoints go to a buffer; apart:
    whether decode computes the sequences of one token."""

    dtype: str
    indices: str
    fresh: bool
    offsets: str
    places: str
    apart: bool = False


NO_TABLES = (None, None, None, None, None, 0)
"""In place of state_indices, fresh, checkpoint_offsets, checkpoint_indices, the states that take
checkpoints, and null_index."""


def slot_tables(tables: tuple[Any, ...]) -> tuple[Any, ...]:
    """state_indices, fresh and null_index."""
    return (*tables[:2], tables[-1])
