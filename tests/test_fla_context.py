"""A context of fla's `build_cp_context` becomes the `gdn.ContextParallel` of the same sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import gdn
from gdn.distributed.halo import _neighbours
from gdn.integrations.fla_context import context_parallel
from gdn.testing import Case, make_inputs
from gdn.token_split import Split, part_of, split

fla_cp = pytest.importorskip("fla.ops.cp")


@contextmanager
def process(rank: int, ranks: int) -> Iterator[Any]:
    """The group of one of several processes, of which there is only this one; it sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def place(own: Split) -> Any:
    """All that a rank computes and exchanges, without the numbers of sequences."""
    return own.parts, [segment[1:] for segment in own.segments]


@given(st.data())
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_rank_has_its_place(layout: Any, data: st.DataObject) -> None:
    ranks, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    parts = 1 + (layout == "zigzag")
    total = ranks * parts * length
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, total), max_size=6))), total]
    lengths = [parts * length] * ranks
    for rank in range(ranks):
        with process(rank, ranks) as group:
            context = fla_cp.build_cp_context(torch.tensor(bounds), group, layout=layout)
            found = context_parallel(context)
            want = split(rank, lengths, bounds, layout)
            got = found.for_tokens(torch.empty(1, lengths[rank], 1))
            assert place(got.split) == place(want)
            for other in range(ranks):  # what others read of this rank's tokens
                read = [
                    rows_of(rank, split(other, lengths, of, layout), ranks, layout)
                    for of in (bounds, found.bounds)
                ]
                assert read[0] == read[1]


def rows_of(rank: int, own: Split, ranks: int, layout: Any) -> list[Any]:
    """The rows of a halo of three tokens that come from a rank."""
    rows = itertools.chain(*_neighbours(own, 3))
    return [row for row in rows if part_of(row[1], ranks, layout)[0] == rank]


def test_the_op_takes_it(tmp_path: Path) -> None:
    """On one process, where zigzag makes two parts."""
    case = Case("parts", lengths=(9, 21), H=1, HV=2, K=8, V=12, initial_state=False)
    inputs = make_inputs(case)
    bounds = inputs.pop("cu_seqlens")
    want = gdn.gated_delta_net(**inputs, cu_seqlens=bounds, backend="torch")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        context = fla_cp.build_cp_context(bounds, dist.group.WORLD, layout="zigzag")
        got = gdn.gated_delta_net(**inputs, cp=context_parallel(context), backend="torch")
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(got.o, want.o, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_known_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a group and cu_seqlens; use fla's"):
        context_parallel(fla_cp.FLACPContext())
    with process(0, 2) as group:
        context = fla_cp.build_cp_context(torch.tensor([0, 8]), group)
        context.pre_num_ranks_dev = torch.zeros(1, dtype=torch.int32)
        with pytest.raises(ValueError, match="must come without pre_num_ranks_dev"):
            context_parallel(context)
