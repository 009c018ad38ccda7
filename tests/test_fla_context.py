"""A context of fla's `build_cp_context` becomes the `gdn.ContextParallel` of the same sequences.
With gdn in fla's registry, fla's functions run on gdn with it."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from context_parallel_ranks import Parallel
from fla_context_ranks import fla_agrees
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import start

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


FUSED = {"initial_state": False, "fused": True}
CASES = [
    Parallel("packed", (32, 32), (10, 34, 1, 19), options=FUSED, final_state=False),
    Parallel("channels", (20, 20), (5, 35), options=FUSED | {"per_channel": True}),
    Parallel("zigzag", (24, 24), (20, 28), "zigzag", FUSED),
]


def test_flas_functions_give_the_whole_sequences(tmp_path: Path) -> None:
    """Their outputs and gradients, on two processes."""
    pytest.importorskip("triton", reason="triton is not installed")
    start(fla_agrees, 2, tmp_path, 120, CASES)


CHUNKED = ("chunk_gated_delta_rule", "chunk_kda")
STEPS = ("fused_recurrent_kda_fwd", "fused_recurrent_gated_delta_rule_fwd")
SMALL = Case("small", T=8, H=1, HV=2, K=8, V=12, initial_state=False)


@pytest.fixture
def integration() -> Iterator[Any]:
    """gdn in fla's registry, on one rank of two."""
    pytest.importorskip("triton", reason="triton is not installed")
    module = importlib.import_module("gdn.integrations.fla")
    with module.register(), process(0, 2):
        yield module


def arguments(function: str, context: Any, device: str = "cpu", **more: Any) -> dict[str, Any]:
    case = replace(SMALL, per_channel="kda" in function)
    inputs = make_inputs(case, device) | {"output_final_state": False}
    return inputs | {"cp_context": context} | more


def make_context(*bounds: int, device: str = "cpu") -> Any:
    on_host = torch.tensor(bounds)
    return fla_cp.build_cp_context(
        on_host.to(device), dist.group.WORLD, cu_seqlens_cpu=on_host.clone()
    )


@pytest.mark.parametrize("function", CHUNKED)
def test_calls_with_states_are_flas_to_refuse(integration: Any, function: str) -> None:
    verify = integration._Gdn().verify
    kind = function.removeprefix("chunk_")
    own = getattr(importlib.import_module(f"fla.ops.{kind}"), function)
    context = make_context(0, 5, 16)
    assert verify(function, **arguments(function, context)) == (True, None)
    for more, said in (
        ({"initial_state": torch.zeros(2, 2, 8, 12)}, "Initial state is not supported for CP"),
        ({"output_final_state": True}, "Output final state is not supported for CP"),
    ):
        given = arguments(function, context, **more)
        reason = f"{next(iter(more))} must come without cp_context, as in fla"
        assert verify(function, **given) == (False, reason)
        with pytest.raises(AssertionError, match=said):
            own(**given)
    passed, reason = verify(function, **arguments(function, fla_cp.FLACPContext()))
    assert not passed
    assert "must have a group and cu_seqlens" in reason


@pytest.mark.parametrize("function", STEPS)
def test_steps_do_not_take_it(integration: Any, function: str) -> None:
    found = integration._Gdn().verify(function, **arguments(function, make_context(0, 16)))
    assert found == (False, "cp_context is for the chunked functions only")


@pytest.mark.parametrize("function", CHUNKED)
def test_a_backend_without_it_says_so(
    integration: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In gdn's error where it is named, and else, as on a GPU, to fla, which goes on by itself."""
    given = arguments(function, make_context(0, 5, 16))
    own = getattr(importlib.import_module(f"fla.ops.{function.removeprefix('chunk_')}"), function)
    with (
        integration.register("fla"),
        pytest.raises(gdn.BackendUnsupportedError, match="context parallelism"),
    ):
        own(**given)
    monkeypatch.setattr(integration, "_request", lambda x: ("fla", False))
    passed, reason = integration._Gdn().verify(function, **given)
    assert not passed
    assert "context parallelism" in reason


def test_a_choice_is_remembered_for_all_contexts(
    integration: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every rank alike, whatever sequences it holds. Tensors without values, as those of a GPU
    that nobody waits for, are enough."""
    monkeypatch.setattr(integration, "_request", lambda x: ("torch", False))
    monkeypatch.setattr(integration, "_refusals", {})
    given = arguments(CHUNKED[0], None, "meta")
    verify = integration._Gdn().verify
    for bounds in ((0, 16), (0, 5, 16), (0, 1, 2, 3, 16)):
        given["cp_context"] = make_context(*bounds, device="meta")
        assert verify(CHUNKED[0], **given) == (True, None)
    assert len(integration._refusals) == 1
    given["cp_context"] = None
    assert verify(CHUNKED[0], **given) == (True, None)
    assert len(integration._refusals) == 2
