"""`gdn.testing.check_backend`: a correct backend passes, and every fault is named."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from gdn.backends.torch import TorchBackend, TorchPlan

import gdn
from gdn.backend import Capabilities, Forward, Gradients
from gdn.problem import Call, PoolCall, Step
from gdn.testing import CASES, check_backend, inputs
from gdn.testing.decode import STEPS
from gdn.testing.prefill import PREFILLS

DTYPES = 4


class Changed(TorchPlan):
    """The torch backend's plan with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(None)
        self.fault = fault

    def forward(self, call: Call, save: bool) -> Forward:
        found = super().forward(call, save)
        if self.fault == "o" and call.cu_seqlens is not None:
            found.o[:, -1:] += 0.1
        if self.fault == "dtype":
            return found._replace(o=found.o.double())
        return found

    def backward(self, *args: Any) -> Gradients:
        found = super().backward(*args)
        return found._replace(beta=1.5 * found.beta) if self.fault == "beta" else found

    def decode(self, step: Step) -> torch.Tensor:
        o = super().decode(step)
        if self.fault == "pool" and step.state_indices is not None:
            step.state.add_(1)
        return o


class Faulty(TorchBackend):
    name = "faulty"
    capabilities = replace(TorchBackend.capabilities, dtypes=(torch.float32,))

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault

    def plan(self, call: Call | PoolCall) -> TorchPlan:
        return Changed(self.fault)


class Modest(Faulty):
    """Declares one dtype and nothing else."""

    name = "modest"
    capabilities = Capabilities(dtypes=(torch.float32,))


def test_a_correct_backend_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a third of the cases: the definition goes token by token."""
    monkeypatch.setattr("gdn.testing.check.CASES", CASES[::3])
    monkeypatch.setattr("gdn.testing.check.STEPS", STEPS[::3])
    monkeypatch.setattr("gdn.testing.check.PREFILLS", PREFILLS[::3])
    agreed, refused = check_backend(Faulty(), "cpu")
    assert agreed == len(CASES[::3]) + len(STEPS[::3]) + len(PREFILLS[::3])
    assert refused == (DTYPES - 1) * agreed
    assert "faulty" not in {info.name for info in gdn.list_backends()}


def test_a_backend_that_declares_one_dtype_refuses_the_rest() -> None:
    agreed, refused = check_backend(Modest(), "cpu")
    assert agreed == sum(_is_plain(case) for case in CASES)
    assert agreed + refused == DTYPES * (len(CASES) + len(STEPS) + len(PREFILLS))


def _is_plain(case: inputs.Case) -> bool:
    options = case.initial_state, case.state_v_first, case.l2norm, case.fused, case.lengths
    return case.H == case.HV and not any(options)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("o", "faulty on case packed, .*: o: "),
        ("dtype", "faulty on case one-token, .*must return o as torch.float32 .*torch.float64"),
        ("beta", "faulty on case one-token, .*: beta: "),
        ("pool", "faulty on case one-token, .*: a slot changed that is not named"),
    ],
)
def test_faults_are_named(fault: str, words: str) -> None:
    with pytest.raises(AssertionError) as error:
        check_backend(Faulty(fault), "cpu")
    assert re.match(words, str(error.value)), error.value
    assert "faulty" not in {info.name for info in gdn.list_backends()}


def test_a_call_that_runs_unclaimed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gdn.dispatch, "find_reasons", lambda *given: [])
    monkeypatch.setattr("gdn.testing.check.reasons_against", lambda *_: ("no luck",))
    with pytest.raises(AssertionError, match="modest runs what it does not claim: no luck"):
        check_backend(Modest(), "cpu")
