"""gdn.warmup: the backend that would run a call is asked to compile for it; nothing is computed."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from gdn.backends.torch import TorchBackend

import gdn
from gdn.backend import Plan
from gdn.cli import main
from gdn.problem import Call, Step
from gdn.testing import Case, make_inputs, with_gradients
from gdn.testing.decode import STEPS, make_step

CASE = Case("ahead", T=70, HV=4)


class Asked(TorchBackend):
    """Remembers what it was asked to compile; does nothing else."""

    name = "asked"

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[type, bool]] = []

    def plan(self, call: Call | Step) -> Plan:
        return AskedPlan(self.heard)


class AskedPlan(Plan):
    """Computes nothing: it has no forward."""

    def __init__(self, heard: list[tuple[type, bool]]) -> None:
        self.heard = heard

    def precompile(self, call: Call | Step, backward: bool) -> bool:
        self.heard.append((type(call), backward))
        return True


@pytest.fixture
def asked(clean_registry: None) -> Asked:
    backend = Asked()
    gdn.register_backend(backend)
    return backend


def test_the_backend_hears_of_calls_gradients_and_steps(asked: Asked) -> None:
    inputs = make_inputs(CASE)
    assert gdn.warmup(**inputs, backend="asked") == "asked"
    gdn.warmup(**inputs, backend="asked", backward=True)
    gdn.warmup(**with_gradients(inputs), backend="asked")
    gdn.warmup(**make_step(STEPS[0]), backend="asked")
    assert asked.heard == [(Call, False), (Call, True), (Call, True), (Step, False)]


def test_it_raises_what_the_call_would(asked: Asked) -> None:
    inputs = make_inputs(CASE)
    with pytest.raises(ValueError, match="beta must be"):
        gdn.warmup(**inputs | {"beta": inputs["beta"][:, 1:]}, backend="asked")
    with pytest.raises(gdn.BackendUnsupportedError, match="tilelang"):
        gdn.warmup(**inputs, backend="tilelang", sm=80)


def test_tensors_may_be_nowhere(asked: Asked) -> None:
    inputs = make_inputs(replace(CASE, dtype=torch.bfloat16), "meta")
    assert gdn.warmup(**inputs, backend="asked", sm=90) == "asked"
    assert main(["warmup", "--backend", "asked", "--shape", "T=128"]) == 0
    assert asked.heard == [(Call, False), (Call, True)]


def test_tilelang_compiles_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tilelang")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    options = ["--backend", "tilelang", "--no-raw", "--no-gradients", "--shape", "T=128,K=64,V=64"]
    assert main(["warmup", *options]) == 0
    assert "tilelang is ready after" in capsys.readouterr().out
