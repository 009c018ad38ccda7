"""gdn in fla's registry: what fla's functions then return, who answers which call, and what
registering and its end change."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from marker import Marker
from support import assert_close, truth

import gdn
from gdn.dispatch import parse_request
from gdn.problem import Call
from gdn.testing import CASES, Case, gradients, make_inputs, make_output_gradients, with_gradients
from gdn.testing.decode import STEPS, as_step, make_step, run_step_definition

pytest.importorskip("fla", reason="fla-core is not installed")
pytest.importorskip("triton", reason="triton is not installed")

NAMES = {
    "channels-packed-fused", "channels-v-first", "channels-lower-bound", "grouped-heads-v-first",
    "packed-v-first-fused", "fused-negative-eigenvalues", "chunk", "odd-head-dims",
}  # fmt: skip
SELECTED = [case for case in CASES if case.name in NAMES]
SMALL = Case("small", T=5, HV=4, K=16, V=16)


@pytest.fixture
def integration() -> Iterator[Any]:
    """The module, with gdn registered as by its import; afterwards fla is as before."""
    module = importlib.import_module("gdn.integrations.fla")
    module.register()
    yield module
    module.unregister()


def fla_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of gdn's op under fla's names."""
    inputs = dict(inputs)
    bound = inputs.pop("gate_lower_bound", None)
    return inputs if bound is None else inputs | {"lower_bound": bound, "safe_gate": True}


def entry(case: Case, recurrent: bool = False) -> Any:
    """fla's public function for a case."""
    name = "kda" if case.per_channel else "gated_delta_rule"
    module = importlib.import_module(f"fla.ops.{name}")
    return getattr(module, f"{'fused_recurrent' if recurrent else 'chunk'}_{name}")


class Own:
    """In the place of fla's autograd function, whose kernels need a GPU: it returns v."""

    calls = 0

    @classmethod
    def apply(cls, q: Any, k: Any, v: Any, *_: Any) -> tuple[Any, None]:
        cls.calls += 1
        return v, None


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> type[Own]:
    """Counts the calls that reach fla's own chunked functions."""
    for module, name in (("gated_delta_rule", "GatedDeltaRule"), ("kda", "KDA")):
        chunk = importlib.import_module(f"fla.ops.{module}.chunk")
        monkeypatch.setattr(chunk, f"Chunk{name}Function", Own)
    Own.calls = 0
    return Own


def fill(function: Any, **options: Any) -> float:
    """The number that the marker backend filled o with."""
    return function(**fla_arguments(make_inputs(SMALL)), **options)[0].flatten()[0].item()


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: case.name)
def test_fla_returns_gdns_outputs_and_gradients(integration: Any, case: Case) -> None:
    """Through fla's own function, by the definition."""
    inputs = with_gradients(make_inputs(case))
    outputs = entry(case)(**fla_arguments(inputs))
    assert type(outputs) is tuple
    got = dict(zip(("o", "final_state"), outputs, strict=True))
    got |= gradients(outputs, inputs, make_output_gradients(case))
    assert set(got) == set(truth(case))
    for name, expected in truth(case).items():
        assert_close(name, got[name], expected, case.dtype)


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: case.name)
def test_fused_recurrences_are_gdns_decode(integration: Any, case: Case) -> None:
    """And leave the state that they start from alone, as fla's do."""
    inputs = make_inputs(case)
    start = inputs.get("initial_state")
    before = None if start is None else start.clone()
    arguments = fla_arguments(inputs)
    arguments.pop("safe_gate", None)
    o, state = entry(case, recurrent=True)(**arguments)
    assert before is None or torch.equal(start, before)
    for name, got in (("o", o), ("final_state", state)):
        assert_close(name, got, truth(case)[name], case.dtype)


def test_dtypes_are_flas(integration: Any) -> None:
    """o in q's dtype, the state in float32, under autocast as well; None for a state that nobody
    asked for."""
    arguments = make_inputs(replace(SMALL, dtype=torch.bfloat16))
    arguments |= {"v": arguments["v"].float()}
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast):
            o, state = entry(SMALL)(**arguments)
            assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
            assert entry(SMALL)(**arguments | {"output_final_state": False})[1] is None
    with torch.autocast("cpu"):
        arguments = make_inputs(SMALL)
        exact, _ = entry(SMALL)(**arguments)
    assert torch.equal(exact, gdn.gated_delta_net(**arguments).o)  # in float32, as fla does


def test_gate_parameters_without_the_fused_gate_are_ignored(integration: Any) -> None:
    """As by fla, which gets them from layers that apply the gate themselves."""
    for case in (SMALL, replace(SMALL, per_channel=True)):
        arguments = make_inputs(case)
        gate = {"A_log": torch.zeros(4), "dt_bias": torch.zeros(4), "lower_bound": -5.0}
        gate = gate if case.per_channel else {"A_log": torch.zeros(4)}
        got = entry(case)(**arguments, **gate)
        for one, other in zip(got, entry(case)(**arguments), strict=True):
            assert torch.equal(one, other)


def test_contexts_restore_what_was_registered(
    integration: Any, clean_registry: None, own: type[Own]
) -> None:
    for number in (1.0, 2.0):
        gdn.register_backend(Marker(f"marker{number:g}", number, gva=True))
    function = entry(SMALL)
    with gdn.use_backend("marker1"):
        assert fill(function) == 1.0  # the import's own registration follows gdn's request
        with integration.register("marker2"):
            assert fill(function) == 2.0
            recurrent = importlib.import_module("fla.ops.gated_delta_rule.fused_recurrent")
            with integration.unregister():
                fill(function)
                assert own.calls == 1
                assert not hasattr(recurrent.fused_recurrent_gated_delta_rule_fwd, "__wrapped__")
            assert hasattr(recurrent.fused_recurrent_gated_delta_rule_fwd, "__wrapped__")
            assert fill(function) == 2.0
            with pytest.raises(ZeroDivisionError), integration.register("marker1"):
                raise ZeroDivisionError
            assert fill(function) == 2.0
        assert fill(function) == 1.0
    integration.unregister()
    fill(function)
    assert own.calls == 2


def test_the_import_registers_and_the_variable_turns_it_off() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore'); import os, torch, gdn.integrations.fla;"
        "from fla.backends import _get_operation_registry as of; g = of('gated_delta_rule');"
        "print(g.get_active().backend_type); os.environ['FLA_GDN'] = '0'; print(g.get_active())"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.split() == ["gdn", "None"]


def test_a_registry_that_is_turned_off_is_named() -> None:
    environment = os.environ | {"FLA_DISABLE_BACKEND_DISPATCH": "1"}
    command = [sys.executable, "-c", "import gdn.integrations.fla"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode
    assert "got FLA_DISABLE_BACKEND_DISPATCH=1; unset it" in ran.stderr


def test_a_named_backend_is_strict(integration: Any) -> None:
    arguments = make_inputs(SMALL)
    with (
        integration.register("fla"),
        pytest.raises(gdn.BackendUnsupportedError, match="fla: dtype must be one of"),
    ):
        entry(SMALL)(**arguments)
    with pytest.raises(gdn.UnknownBackendError, match="did you mean 'torch'"):
        integration.register("troch")
    with pytest.raises(TypeError, match="backend must be a str, got int"):
        integration.register(5)


@pytest.mark.parametrize(
    ("channels", "more", "reason"),
    [
        (True, {"return_intermediate_states": True}, "not know return_intermediate_states"),
        (True, {"use_graph": True}, "gdn does not know use_graph"),
        (False, {"transpose_state_layout": True}, "gdn does not know transpose_state_layout"),
    ],
)
def test_what_gdn_does_not_know_is_flas(
    integration: Any, channels: bool, more: dict[str, Any], reason: str
) -> None:
    """With a named backend too: fla's own function runs."""
    case = replace(SMALL, per_channel=channels)
    name = "chunk_kda" if channels else "chunk_gated_delta_rule"
    for backend in (None, "torch"):
        with integration.register(backend):
            verdict = integration._Gdn().verify(name, **make_inputs(case), **more)
            assert not verdict[0]
            assert reason in verdict[1]
            assert integration._Gdn().verify(name, **make_inputs(case)) == (True, None)


def test_on_a_gpu_auto_is_gdns_own_kernels_or_flas(
    integration: Any, own: type[Own], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals are remembered, so that fla does not wait for them at each call."""
    meta = torch.empty(1, device="meta")  # like a GPU, no CPU
    request, must_run = integration._request(meta)
    assert not must_run
    names = parse_request(request)
    assert names[0] == "tilelang"
    assert not {"fla", "torch"} & set(names)
    monkeypatch.setattr(integration, "_request", lambda x: ("tilelang", False))
    refuse = integration._refusal
    asked: list[Any] = []

    def count(*given: Any) -> str:
        asked.append(given)
        return refuse(*given)

    monkeypatch.setattr(integration, "_refusals", {})
    monkeypatch.setattr(integration, "_refusal", count)
    arguments = make_inputs(SMALL)
    for calls in (1, 2):
        o, _ = entry(SMALL)(**arguments)
        assert o is arguments["v"]
        assert own.calls == calls
    assert len(asked) == 1
    verdict = integration._Gdn().verify("chunk_gated_delta_rule", **arguments)
    assert "tensors must be on cuda, got cpu" in verdict[1]
    leaves = with_gradients(arguments)
    entry(SMALL)(**leaves)
    assert len(asked) == 2  # gradients are another question


def test_gdns_fla_backend_reaches_flas_own_functions(
    integration: Any, own: type[Own], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though gdn is registered, and also where FlashQLA may answer."""
    from gdn.backends.fla import BACKEND

    monkeypatch.setattr(integration, "_run", lambda *_: pytest.fail("gdn answered itself"))
    channels = replace(SMALL, per_channel=True)
    for calls, (case, flash) in enumerate(((SMALL, "0"), (SMALL, "1"), (channels, "0")), start=1):
        monkeypatch.setenv("FLA_FLASH_QLA", flash)
        call = Call(**{"scale": 0.25} | make_inputs(case))
        BACKEND.plan(call).forward(call, save=False)
        assert own.calls == calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite tests it on the GPU")
@pytest.mark.parametrize("name", ["one-token", "channels"])
def test_its_decode_reaches_flas_recurrence(
    integration: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In Triton's interpreter."""
    from gdn.backends.fla import BACKEND

    monkeypatch.setattr(integration, "_run", lambda *_: pytest.fail("gdn answered itself"))
    inputs = make_step(next(case for case in STEPS if case.name == name))
    expected_o, expected = run_step_definition(inputs)
    step = as_step(inputs)
    o = BACKEND.plan(step).decode(step)
    assert_close("o", o, expected_o, torch.float32)
    assert_close("state", inputs["state"], expected, torch.float32)
