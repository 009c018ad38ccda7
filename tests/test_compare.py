"""Comparisons without the command line: backward alone, captures that fail, decode steps, and
agreement at the full size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from gdn.backends.torch import TorchBackend, TorchPlan

import gdn
from gdn.backend import Forward
from gdn.compare import comparison as comparing
from gdn.compare.comparison import Comparison
from gdn.compare.decode import DECODE, StepComparison
from gdn.compare.roofline import Ceilings
from gdn.compare.timing import Run, Timing
from gdn.problem import Call, PoolCall, Step
from gdn.testing import Case, agreement
from gdn.testing.decode import StepCase

CPU = torch.device("cpu")
CASE = Case("small", T=300, K=16, V=16, l2norm=True, gates="model")
LIMITS = Ceilings(1e12, 1e11)


class WrongLater(TorchBackend):
    """Correct in the short case, wrong in tokens past 200."""

    name = "wrong_later"

    def plan(self, call: Call | PoolCall) -> TorchPlan:
        return WrongLaterPlan(None)


class WrongLaterPlan(TorchPlan):
    def forward(self, call: Call, save: bool) -> Forward:
        right = super().forward(call, save)
        if call.q.shape[1] > 200:
            right.o[:, 200:] *= 1.01
        return right


def test_backward_alone_can_be_repeated() -> None:
    comparison = Comparison(CASE, CPU, ["torch"])
    (row,) = comparison.rows
    comparison.check(row)
    back: Any = comparison.call("torch", "bwd")
    first, second = back(), back()
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    comparison.time("bwd", LIMITS)
    assert row.passes["bwd"].wall.clock == "wall"
    assert {"o", "initial_state", "g"} <= set(row.errors)


@pytest.mark.usefixtures("clean_registry")
def test_agreement_is_tested_at_the_size_that_is_timed() -> None:
    gdn.register_backend(WrongLater())
    comparison = Comparison(CASE, CPU, ["wrong_later"])
    (row,) = comparison.rows
    comparison.check(row)
    assert "relative error above 0.0001: o " in row.failures["fwd"]
    comparison.time("fwd", LIMITS)
    assert not row.passes


@pytest.mark.parametrize("per_channel", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("lengths", [None, (90, 0, 40)], ids=["dense", "packed"])
def test_the_reference_is_computed_a_few_heads_at_a_time(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...] | None, per_channel: bool
) -> None:
    case = Case("heads", T=130, H=3, HV=6, K=16, V=8, lengths=lengths, fused=True)
    case = replace(case, per_channel=per_channel, gate_lower_bound=-5.0 if per_channel else None)
    inputs = agreement.make(case, CPU)
    whole = agreement.in_float64(inputs, "fwd+bwd")
    monkeypatch.setattr(agreement, "TOKEN_HEADS", 2 * 2 * 130)  # two q/k heads, then one
    parts = agreement.in_float64(inputs, "fwd+bwd")
    assert set(parts) == set(whole) == {*agreement.HEADS_AT}
    for name, x in parts.items():
        torch.testing.assert_close(x, whole[name], atol=1e-12, rtol=1e-12)


def test_backward_that_is_not_captured_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def gpu_times(
        runs: Mapping[str, Run], graphed: Mapping[str, bool], seconds: float
    ) -> dict[str, Timing]:
        timed.append(sorted(runs))
        return {name: Timing(2.0 + len(timed), 0.1, 5, "events") for name in runs}

    monkeypatch.setattr(comparing, "gpu_times", gpu_times)
    comparison = Comparison(CASE, CPU, ["torch"])
    found = comparison.gpu_times("bwd", ["torch"])["torch"]
    assert found.clock == "difference"
    assert comparison.gpu_times("fwd+bwd", ["torch"])["torch"].clock == "events"
    assert timed == [[], ["torch"], ["torch"]]


@pytest.mark.usefixtures("clean_registry")
def test_steps_are_checked_and_timed() -> None:
    class WrongPlan(TorchPlan):
        def decode(self, step: Step) -> torch.Tensor:
            return 1.01 * super().decode(step)

    class WrongStep(TorchBackend):
        name = "wrong_step"

        def plan(self, call: Call | PoolCall) -> TorchPlan:
            return WrongPlan(None)

    gdn.register_backend(WrongStep())
    case = StepCase("step", B=4, HV=4, K=16, V=16, fused=True, full=True)
    comparison = StepComparison(case, CPU, ["torch", "wrong_step"])
    for row in comparison.rows:
        comparison.check(row)
    comparison.time(DECODE, LIMITS)
    right, wrong = comparison.rows
    assert right.errors["state"] < 1e-6
    assert right.passes[DECODE].gbytes > 0
    assert "o 1.0e-02" in wrong.failures[DECODE]
    assert not wrong.passes
