"""Thread blocks of the one kernel that take sequence after sequence (`forward/fused_tasks.py`):
against the definition in the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn.problem import Call
from gdn.testing import Case, make_inputs
from gdn.testing.prefill import make_prefill

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

import test_tilelang as compiled
import test_tilelang_pool as pools
from gdn.backends.tilelang.forward import fused_plan
from gdn.backends.tilelang.forward import plan as forward
from support import assert_close, compile_together, poisoned_memory, require  # noqa: F401
from test_tilelang_emulated import WORLDS, check, folder, world  # noqa: F401
from test_tilelang_fused import fail_without, prefer_one_kernel

import gdn

SHORT = Case(
    "short", lengths=(70, 0, 0, 0, 0, 0, 1, 64, 200, 3, 0, 128, 65, 0, 17), H=1, HV=2, K=128, V=128,
    dtype=torch.bfloat16, fused=True, allow_neg_eigval=True,
)  # fmt: skip
"""Among them more sequences without tokens in a row than there are slots in the ring."""
DENSE = replace(SHORT, name="dense", lengths=None, B=7, T=70)
"""More tasks a thread block than there are slots in the ring."""


@pytest.fixture
def two_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take the one kernel, in two thread blocks."""
    monkeypatch.setattr(forward, "prepare", None)  # not used
    prefer_one_kernel(monkeypatch)
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
        DENSE,
        replace(DENSE, name="whole-chunks", T=128, B=3, fused=False, allow_neg_eigval=False),
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


@pytest.mark.usefixtures("poisoned_memory", "two_sms")
def test_a_dense_pool(world: Callable[..., None]) -> None:  # noqa: F811
    """Every third sequence has no slot; every second one starts from zero."""
    world(late=True)
    sizes = {"lengths": None, "B": 6, "T": 130, "tail": 0, "H": 1, "HV": 2, "K": 128, "V": 128}
    pools.check(replace(pools.EVERYTHING, name="dense", **sizes))


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


@pytest.mark.usefixtures("two_sms")
@pytest.mark.parametrize("slow", [0, 4, 12, 13, 14])
def test_a_warp_of_a_dense_call_may_be_slow(
    world: Callable[..., None],  # noqa: F811
    slow: int,
) -> None:
    world(late=True, slow=slow)
    check(DENSE, make_inputs(DENSE))


@pytest.mark.usefixtures("two_sms")
def test_a_dense_call_serialises_no_product_and_spills_outside_of_loops(tmp_path: Path) -> None:
    """Spilled are addresses of the gate and the storing warp."""
    (kernel,) = compile_together(*compiled.plan_of(DENSE)[0].jobs(save=False))
    compiled.assert_compiles_well(kernel, tmp_path, spilled=96)


@pytest.mark.parametrize(
    ("B", "T", "packed", "rings"),
    [
        (4, 8192, True, True),
        (4, 8192, False, False),  # as many scans as SMs, nearly
        (8, 1024, False, False),  # long
        (8, 512, False, True),
        (64, 300, False, True),
    ],
)
def test_packed_calls_and_many_short_sequences_are_taken_in_turn(
    B: int, T: int, packed: bool, rings: bool
) -> None:
    x = torch.empty((B, T, 32, 128), device="meta")
    call = Call(x, x, x, x[..., 0], x[..., 0])
    if packed:
        one, bounds = (y.flatten(0, 1)[None] for y in call[:5]), torch.empty(B + 1)
        call = Call(*one)._replace(cu_seqlens=bounds)
    forward_pass = forward.ForwardPass(call)
    ((_, options),) = forward_pass.jobs(save=False)
    assert options["ring"] == rings
    assert (forward_pass.fused[False].new_counter() is not None) == packed


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [
        {"lengths": (300,) * 64},
        {"lengths": tuple(n % 130 for n in range(300))},
        {"lengths": (1,) * 64},
        {"lengths": None, "B": 64, "T": 300},
        {"lengths": None, "B": 300, "T": 16},
    ],
    ids=str,
)
def test_a_graph_gives_the_same_bits_again(sizes: Any) -> None:
    """And those of a launch; which thread block draws a sequence does not matter."""
    case = replace(SHORT, **sizes, H=4, HV=8, allow_neg_eigval=False, gates="model")
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
