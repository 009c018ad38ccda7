"""The mode of gdn.batch_invariant: precedence, refusals, compiled calls, and kernels that do not
depend on the batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import TOKENS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gdn
from gdn import calls
from gdn.problem import Call, Step
from gdn.testing import Case, make_inputs, with_gradients
from gdn.testing.decode import StepCase, make_step


@pytest.fixture(autouse=True)
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("GDN_BATCH_INVARIANT", raising=False)
    yield
    gdn.set_batch_invariant(None)


def is_on(**options: Any) -> bool:
    """Whether a call made now is batch-invariant."""
    found = gdn.explain(**make_inputs(Case("call", T=1)), **options, backend="torch")
    return found.problem.batch_invariant


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context, then default, then GDN_BATCH_INVARIANT read at call time."""
    assert not is_on()
    monkeypatch.setenv("GDN_BATCH_INVARIANT", "1")
    assert is_on()
    gdn.set_batch_invariant(False)
    assert not is_on()
    with gdn.batch_invariant():
        assert is_on()
        with gdn.batch_invariant(False):
            assert not is_on()
        elsewhere: list[bool] = []
        thread = threading.Thread(target=lambda: elsewhere.append(is_on()))
        thread.start()
        thread.join()
        assert elsewhere == [False]
    gdn.set_batch_invariant(None)
    assert is_on()
    monkeypatch.setenv("GDN_BATCH_INVARIANT", "0")
    assert not is_on()
    monkeypatch.setenv("GDN_BATCH_INVARIANT", "yes")
    with pytest.raises(ValueError, match="GDN_BATCH_INVARIANT must be 0 or 1, got 'yes'"):
        is_on()
    with pytest.raises(TypeError, match="enabled must be a bool, got int"):
        gdn.set_batch_invariant(1)  # type: ignore[arg-type]


def test_it_is_refused_by_name() -> None:
    inputs = make_inputs(Case("call", T=2))
    with gdn.batch_invariant():
        with pytest.raises(gdn.BackendUnsupportedError, match=r"batch invariance \(gdn"):
            gdn.gated_delta_net(**inputs, backend="fla")
        told = str(gdn.explain(**inputs, backend="torch"))
        assert "batch_invariant" in told
        assert "never in pieces" in told
        with pytest.raises(TypeError, match="batch_invariant"):
            gdn.explain(**inputs, batch_invariant=False)  # type: ignore[call-arg]


def test_compiled_calls_keep_the_mode_of_their_trace() -> None:
    inputs = make_inputs(Case("call", lengths=(3, 70), K=16, V=16))

    def call(**given: Any) -> tuple[Tensor, Tensor | None]:
        return gdn.gated_delta_net(**given, backend="torch")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with gdn.batch_invariant():
        expected = call(**inputs)
        traced = compiled(**inputs)
    later = compiled(**inputs)
    for x, y, z in zip(expected, traced, later, strict=True):
        assert x is not None
        assert y is not None
        assert z is not None
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_checkpointing_computes_again_in_the_mode_that_is_set() -> None:
    gdn.set_batch_invariant(True)
    inputs = with_gradients(make_inputs(Case("call", lengths=(3, 70), K=16, V=16)))

    def call(q: Tensor) -> Tensor:
        return gdn.gated_delta_net(**inputs | {"q": q}, backend="torch").o

    expected = torch.autograd.grad(call(inputs["q"]).sum(), inputs["q"])
    again = checkpoint(call, inputs["q"], use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), inputs["q"])[0], expected[0])


LONG = Case("long", T=32768, H=2, HV=4, K=128, V=128, dtype=torch.bfloat16)
MANY = Case("many", T=256, B=200, H=2, HV=4, K=128, V=128, dtype=torch.bfloat16)


def calls_of(*cases: Case, invariant: bool = True) -> list[Call]:
    """Calls on the meta device."""
    return [
        Call(**{"scale": 1.0} | make_inputs(case, "meta"), batch_invariant=invariant)
        for case in cases
    ]


def test_triton_neither_cuts_nor_counts() -> None:
    """Outside of the mode a long sequence of few heads is cut, and its scans have other blocks."""
    pytest.importorskip("triton")
    from gdn.backends.triton.plan import PrefillPlan
    from gdn.backends.triton.scan import scan_kernel

    def kinds(invariant: bool) -> list[tuple[Any, ...]]:
        plans = [PrefillPlan(call) for call in calls_of(LONG, MANY, invariant=invariant)]
        stages = [plan.bind(scan_kernel, 1, plan.scan_sizes) for plan in plans]
        return [
            (plan.piece_length, stage.options, stage.kernel_constants["BV"])
            for plan, stage in zip(plans, stages, strict=True)
        ]

    long, many = kinds(True)
    assert long == many
    long, many = kinds(False)
    assert long[0] is not None
    assert long[1:] != many[1:]


def test_tilelang_scans_whole_sequences_by_two_kernels() -> None:
    pytest.importorskip("tilelang")
    from gdn.backends.tilelang.backward.plan import BackwardPass
    from gdn.backends.tilelang.forward.plan import ForwardPass

    for call in calls_of(LONG, MANY):
        plan = ForwardPass(call)
        assert not any(plan.fused.values())
        assert {*plan.pieces.values()} == {(None, 1)}
        assert BackwardPass(call).length is None
    long, many = (ForwardPass(call) for call in calls_of(LONG, MANY, invariant=False))
    assert long.pieces[True][0] is not None
    assert all(many.fused.values())


def test_decode_kernels_do_not_depend_on_the_number_of_states() -> None:
    """TileLang's and Triton's; outside of the mode they do."""
    pytest.importorskip("tilelang")
    pytest.importorskip("triton")
    from gdn.backends.tilelang.decode import plan as tilelang
    from gdn.backends.triton import decode as triton

    def kinds(v_first: bool) -> set[tuple[Any, ...]]:
        found = set()
        for B in (1, 20, 500, 2000):
            case = StepCase("step", B=B, HV=4, dtype=torch.bfloat16, state_v_first=v_first)
            step = calls.make(**_by_name(make_step(case)), prefill=False)
            assert isinstance(step, Step)
            stages = triton.DecodePlan(step).stages[True]
            shape = tilelang.DecodePlan(step).shapes[True]
            found.add((shape, stages.kernel_constants["BV"], *stages.options.values()))
        return found

    for v_first in (False, True):
        assert len(kinds(v_first)) > 1
        with gdn.batch_invariant():
            assert len(kinds(v_first)) == 1


def _by_name(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `calls.make`."""
    tensors = {name: inputs.pop(name) for name in TOKENS}
    return tensors | {"options": inputs}


def test_backward_never_cuts_a_sequence_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """TileLang's memory rounds: the batch decides into how many parts a sequence is cut, and scans
    round once more between parts."""
    from gdn.backends.common import chunking
    from gdn.backends.tilelang import memory_rounds as rounds

    for module in (chunking, rounds):
        monkeypatch.setattr(module, "sm_count", lambda device: 132)
    case = Case("long", H=16, HV=32, K=128, V=128, T=1, dtype=torch.bfloat16)
    inputs = make_inputs(case, "meta")
    tokens = {n: inputs[n].new_empty(1, 20480, *inputs[n].shape[2:]) for n in TOKENS}
    call = Call(**{"scale": 1.0} | inputs | tokens)
    assert rounds.round_shape(call) == (1, 2)
    assert rounds.round_shape(call._replace(batch_invariant=True)) == (1, 1)
