"""gdn.warmup: calls `precompile` of the backend that would run the call, and computes nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from gdn.backends.torch import TorchBackend

import gdn
from gdn.backend import Plan
from gdn.cli import main
from gdn.problem import Call, PoolCall, Step
from gdn.testing import Case, make_inputs, with_gradients
from gdn.testing.decode import STEPS, make_step

CASE = Case("ahead", T=70, HV=4)


class Recording(TorchBackend):
    """Records the calls of `precompile`; does nothing else."""

    name = "recording"

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[type, bool]] = []

    def plan(self, call: Call | PoolCall) -> Plan:
        return RecordingPlan(self.requests)


class RecordingPlan(Plan):
    """Has no forward: any computation raises."""

    def __init__(self, requests: list[tuple[type, bool]]) -> None:
        self.requests = requests

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        self.requests.append((type(call), backward))
        return True


@pytest.fixture
def recording(clean_registry: None) -> Recording:
    backend = Recording()
    gdn.register_backend(backend)
    return backend


def test_precompile_gets_calls_gradients_and_steps(recording: Recording) -> None:
    inputs = make_inputs(CASE)
    assert gdn.warmup(**inputs, backend="recording") == "recording"
    gdn.warmup(**inputs, backend="recording", backward=True)
    gdn.warmup(**with_gradients(inputs), backend="recording")
    gdn.warmup(**make_step(STEPS[0]), backend="recording")
    assert recording.requests == [(Call, False), (Call, True), (Call, True), (Step, False)]


@pytest.mark.usefixtures("recording")
def test_it_raises_the_errors_of_the_call() -> None:
    inputs = make_inputs(CASE)
    with pytest.raises(ValueError, match="beta must be"):
        gdn.warmup(**inputs | {"beta": inputs["beta"][:, 1:]}, backend="recording")
    with pytest.raises(gdn.BackendUnsupportedError, match="tilelang"):
        gdn.warmup(**inputs, backend="tilelang", sm=80)


def test_tensors_may_be_on_the_meta_device(recording: Recording) -> None:
    inputs = make_inputs(replace(CASE, dtype=torch.bfloat16), "meta")
    assert gdn.warmup(**inputs, backend="recording", sm=90) == "recording"
    assert main(["warmup", "--backend", "recording", "--shape", "T=128"]) == 0
    assert recording.requests == [(Call, False), (Call, True)]


def test_tilelang_compiles_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tilelang")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    options = ["--backend", "tilelang", "--no-raw", "--no-gradients", "--shape", "T=128,K=64,V=64"]
    assert main(["warmup", *options]) == 0
    assert "tilelang is ready after" in capsys.readouterr().out
