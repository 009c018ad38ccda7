"""Thread blocks of the one kernel that draw sequence after sequence (`forward/fused_tasks.py`):
against the definition in the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gdn.problem import Call
from gdn.testing import Case, make_inputs
from gdn.testing.prefill import make_prefill

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

import test_tilelang_pool as pools
from gdn.backends.tilelang.forward import fused_plan
from gdn.backends.tilelang.forward import plan as forward
from support import assert_close, poisoned_memory, require  # noqa: F401
from test_tilelang_emulated import WORLDS, check, folder, world  # noqa: F401
from test_tilelang_fused import fail_without

import gdn

SHORT = Case(
    "short", lengths=(70, 0, 0, 0, 0, 0, 1, 64, 200, 3, 0, 128, 65, 0, 17), H=1, HV=2, K=128, V=128,
    dtype=torch.bfloat16, fused=True, allow_neg_eigval=True,
)  # fmt: skip
"""Among them more sequences without tokens in a row than there are slots in the ring."""


@pytest.fixture
def two_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take the one kernel, in two thread blocks."""
    monkeypatch.setattr(forward, "prepare", None)  # not used
    monkeypatch.setattr(fused_plan, "MIN_SHARE", 0.0)
    monkeypatch.setattr(fused_plan, "choose_piece_length", lambda call: None)
    monkeypatch.setattr(fused_plan, "sm_count", lambda device: 2)


@pytest.mark.usefixtures("poisoned_memory", "two_sms")
@WORLDS
@pytest.mark.parametrize(
    "case",
    [
        SHORT,
        replace(SHORT, name="plain", fused=False, allow_neg_eigval=False, state_v_first=True),
        replace(SHORT, name="float16", dtype=torch.float16, K=64, gates="model"),
        replace(SHORT, name="from-zero", initial_state=False, lengths=SHORT.lengths[::-1]),
        replace(SHORT, name="nothing", lengths=(0,) * 7),
    ],
    ids=lambda case: case.name,
)
def test_agrees_with_the_definition(
    world: Callable[..., None],  # noqa: F811
    case: Case,
    late: bool,
) -> None:
    world(late)
    check(case, make_inputs(case))


@pytest.mark.usefixtures("poisoned_memory", "two_sms")
@pytest.mark.parametrize("case", [pools.EVERYTHING, pools.FLOAT16], ids=lambda case: case.name)
def test_pools(world: Callable[..., None], case: Any) -> None:  # noqa: F811
    world(late=True)
    lengths = (130, 0, 0, 0, 70, 65, 0, 64, 1, 128)
    pools.check(replace(case, lengths=lengths, H=1, HV=2, K=128, V=128))


@pytest.mark.usefixtures("two_sms")
def test_a_pool_is_filled_without_a_new_output(
    world: Callable[..., None],  # noqa: F811
) -> None:
    """Then no kernel clears tokens past the last sequence, and sets the counter."""
    world(late=False)
    case = replace(pools.EVERYTHING, H=1, HV=2, K=128, V=128, tail=0)
    results = []
    for out in (None, torch.empty((1, sum(case.lengths), 2, 128), dtype=case.dtype)):
        inputs = make_prefill(case)
        o = gdn.gated_delta_net_prefill(**inputs | {"out": out}, backend="emulated")
        results.append((o.clone(), inputs["state"]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.usefixtures("two_sms")
@pytest.mark.parametrize("slow", [0, 3, 4, 8, 12, 13, 14, 15])
def test_a_warp_may_be_slow(world: Callable[..., None], slow: int) -> None:  # noqa: F811
    """Two warps of the intra-chunk warpgroup, one of each consumer warpgroup, the loading, the
    storing, the gate and the norm warp."""
    world(late=True, slow=slow)
    check(SHORT, make_inputs(SHORT))


@pytest.mark.usefixtures("two_sms")
@pytest.mark.parametrize(("waits", "slow"), [("task_ready", 12), ("task_free", 13)])
def test_a_missing_wait_shows(
    world: Callable[..., None],  # noqa: F811
    waits: str,
    slow: int,
) -> None:
    fail_without(world, waits, slow, SHORT)


def test_packed_calls_draw_and_others_do_not() -> None:
    x = torch.empty((4, 8192, 32, 128), device="meta")
    call = Call(x, x, x, x[..., 0], x[..., 0])
    one, bounds = (y.flatten(0, 1)[None] for y in call[:5]), torch.empty(5)
    packed = Call(*one)._replace(cu_seqlens=bounds)
    ((_, dense),) = forward.ForwardPass(call).jobs(save=False)
    ((_, drawn),) = forward.ForwardPass(packed).jobs(save=False)
    assert not dense["ring"]
    assert drawn["ring"]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(300,) * 64, tuple(n % 130 for n in range(300)), (1,) * 64])
def test_a_graph_gives_the_same_bits_again(lengths: tuple[int, ...]) -> None:
    """And those of a launch; which thread block draws a sequence does not matter."""
    case = replace(SHORT, lengths=lengths, H=4, HV=8, allow_neg_eigval=False, gates="model")
    inputs = make_inputs(case, "cuda")
    require("tilelang", inputs)
    expected, first = (gdn.gated_delta_net(**inputs, backend=x) for x in ("torch", "tilelang"))
    for name in ("o", "final_state"):
        assert_close(name, getattr(first, name), getattr(expected, name), case.dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, state = gdn.gated_delta_net(**inputs, backend="tilelang")
    for _ in range(20):
        o.fill_(float("nan"))
        graph.replay()
        assert torch.equal(o, first.o)
        assert torch.equal(state, first.final_state)
