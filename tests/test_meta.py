"""Tensors without data, on the meta device or fake, go through every op and the layer: results have
the shapes, dtypes and strides of a real call's, and no backend runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gdn
from gdn import problem
from gdn.nn import GatedDeltaNet
from gdn.testing import Case, make_inputs, with_gradients
from gdn.testing.decode import STEPS, StepCase, make_step

CASES = [
    Case("dense", T=70, HV=4),
    Case("fused", B=2, T=5, fused=True, allow_neg_eigval=True, initial_state=False),
    Case("packed", lengths=(70, 0, 5), l2norm=True),
    Case("packed-fused", lengths=(70, 0, 5), HV=4, fused=True, state_v_first=True),
    Case("no-tokens", T=0),
]
KINDS = ["meta", "fake cpu", "fake cuda"]
ONLY_CPU = torch.version.cuda is None


def mode(kind: str) -> AbstractContextManager[Any]:
    """The context in which tensors of this kind live."""
    return FakeTensorMode() if kind.startswith("fake") else nullcontext()


def strip(inputs: dict[str, Any], kind: str) -> dict[str, Any]:
    """The inputs with tensors of the same shapes, strides and dtypes, but without data."""
    device = kind.removeprefix("fake ")
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        if isinstance(x, Tensor)
        else x
        for name, x in inputs.items()
    }


def assert_like(got: Tensor | None, expected: Tensor | None, device: torch.device) -> None:
    """Both are None, or they have the same shape, strides and dtype."""
    if got is None or expected is None:
        assert got is expected
        return
    assert got.device == device
    assert (got.shape, got.stride()) == (expected.shape, expected.stride())
    assert got.dtype == expected.dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("final", [True, False])
def test_prefill(kind: str, dtype: torch.dtype, case: Case, final: bool) -> None:
    inputs = make_inputs(replace(case, dtype=dtype)) | {"output_final_state": final}
    expected = gdn.gated_delta_net(**inputs, backend="torch")
    with mode(kind):
        tensors = strip(inputs, kind)
        got = gdn.gated_delta_net(**tensors)
        for x, y in zip(got, expected, strict=True):
            assert_like(x, y, tensors["q"].device)
        with pytest.raises(ValueError, match=r"beta must be \[B, T, HV\]"):
            gdn.gated_delta_net(**tensors | {"beta": tensors["v"]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(kind: str, dtype: torch.dtype, case: Case) -> None:
    if kind == "fake cuda" and ONLY_CPU:
        pytest.skip("in a build without CUDA, torch's autograd ends the process")
    inputs = make_inputs(replace(case, dtype=dtype))
    with mode(kind):
        tensors = with_gradients(strip(inputs, kind))
        o, state = gdn.gated_delta_net(**tensors)
        (o.float().sum() + state.sum()).backward()
        leaves = [x for x in tensors.values() if isinstance(x, Tensor) and x.requires_grad]
        assert len(leaves) >= 5
        for x in leaves:
            assert_like(x.grad, x, x.device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_decode(kind: str, case: StepCase) -> None:
    inputs = make_step(case)
    expected = gdn.gated_delta_net_decode(**inputs, backend="torch")
    with mode(kind):
        tensors = strip(inputs, kind)
        o = gdn.gated_delta_net_decode(**tensors)
        assert_like(o, expected, tensors["q"].device)
        with pytest.raises(ValueError, match="state must be"):
            gdn.gated_delta_net_decode(**tensors | {"state": tensors["v"]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ["cpu", "meta"])
def test_lengths_on_the_host(kind: str, host: str) -> None:
    if kind != "meta" and host == "meta":
        pytest.skip("the lengths must be on the CPU, and are fake there")
    inputs = make_inputs(CASES[3])
    with mode(kind):
        tensors = strip(inputs, kind)
        lengths = torch.tensor([0, 70, 70, 75], dtype=torch.int32).to(host)
        o = gdn.gated_delta_net(**tensors, cu_seqlens_cpu=lengths).o
        assert_like(o, inputs["v"], tensors["q"].device)


@pytest.mark.parametrize("kind", KINDS)
def test_explain_and_warmup(kind: str) -> None:
    """They look at metadata alone."""
    for inputs in (make_inputs(CASES[3]), make_step(STEPS[8]), make_step(STEPS[9])):
        expected = gdn.explain(**inputs)
        with mode(kind):
            tensors = strip(inputs, kind)
            assert gdn.explain(**tensors).verdicts[-1].name == expected.verdicts[-1].name
            assert gdn.warmup(**tensors, backend="torch") == "torch"


def test_no_backend_runs_on_the_meta_device(clean_registry: None) -> None:
    """Not even one that takes any device; a request for one that needs a GPU is refused."""

    class Untouched(gdn.Backend):
        name = "untouched"
        summary = "makes no plan"
        capabilities = replace(gdn.list_backends()[-1].capabilities, devices=())
        priority = 10**6

        def plan(self, call: Any) -> Any:
            raise AssertionError("a plan was asked for")

    gdn.register_backend(Untouched())
    prefill, step = (strip(x, "meta") for x in (make_inputs(CASES[3]), make_step(STEPS[0])))
    gdn.gated_delta_net(**prefill)
    gdn.gated_delta_net(**with_gradients(prefill)).o.sum().backward()
    gdn.gated_delta_net_decode(**step)
    with pytest.raises(gdn.BackendUnsupportedError, match="tensors must be on cuda, got meta"):
        gdn.gated_delta_net(**prefill, backend="tilelang")


def test_a_gpu_that_only_fake_tensors_name_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """It has no compute capability, and "auto" chooses torch without a warning that it is slow."""

    def touched(device: object) -> tuple[int, int]:
        raise AssertionError(f"{device} was asked for")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", touched)
    assert problem.compute_capability.__wrapped__(torch.device("cuda")) is None
    assert problem.compute_capability.__wrapped__(torch.device("cuda:3")) is None
    gdn.dispatch._warn_once.cache_clear()
    problem.compute_capability.cache_clear()
    try:
        with FakeTensorMode():
            tensors = strip(make_inputs(CASES[0]), "fake cuda")
            assert gdn.gated_delta_net(**tensors).o.is_cuda
            assert gdn.explain(**tensors).chosen == "torch"
    finally:
        problem.compute_capability.cache_clear()
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["meta", "fake cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer(kind: str, dtype: torch.dtype) -> None:
    """Dense and packed, with gradients; sequences and steps through a cache."""
    device = kind.removeprefix("fake ")
    with mode(kind):
        layer = GatedDeltaNet(
            32, num_k_heads=2, num_v_heads=4, head_k_dim=16, head_v_dim=24,
            device=device, dtype=dtype,
        )  # fmt: skip
        x = torch.empty(1, 90, 32, device=device, dtype=dtype)
        for cu_seqlens in (None, torch.empty(4, dtype=torch.int32, device=device)):
            y = layer(x, cu_seqlens=cu_seqlens)
            assert_like(y, x, x.device)
            y.float().sum().backward()
        for parameter in layer.parameters():
            assert_like(parameter.grad, parameter, x.device)
        for grad in (False, True):
            cache = layer.make_cache(1)
            with torch.set_grad_enabled(grad):
                for piece in x.split([70, 1, 5, 14], 1):
                    y = layer(piece, cache=cache)
                    assert y.shape == piece.shape
                    assert y.dtype == dtype
            assert_like(cache.conv, torch.empty(1, 160, 4, dtype=dtype), x.device)
            assert_like(cache.state, torch.empty(1, 4, 16, 24), x.device)
