"""A decay per channel inside PyTorch: opcheck, torch.compile, tensors without data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import require
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gdn
from gdn.problem import Call
from gdn.testing import Case, make_inputs, with_gradients
from gdn.testing.decode import StepCase, make_step

CASES = (
    Case("dense", T=20, HV=4, K=8, V=12, per_channel=True),
    Case(  # fla's TileLang part of backward does not compile for 16 channels
        "packed-bounded", lengths=(20, 0, 5), K=20, V=20, fused=True, per_channel=True,
        gate_lower_bound=-5.0, state_v_first=True,
    ),
)  # fmt: skip
LEAVES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_an_op_of_pytorch(backend: str, device: str, dtype: torch.dtype, case: Case) -> None:
    """opcheck, and one node under torch.compile with the same gradients."""
    inputs = with_gradients(make_inputs(replace(case, dtype=dtype), device))
    require(backend, inputs)
    call = Call(**{"scale": 0.5} | inputs)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if backend != "fla":  # some of what fla saves it does not write, and NaN is not NaN
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.gdn.forward.default, (*call, backend, True), test_utils=tests)
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]

    def step(inputs: dict[str, Any]) -> Tensor:
        o, state = gdn.gated_delta_net(**inputs, backend=backend)
        return o.sum() + state.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(inputs), leaves)
    expected = torch.autograd.grad(step(inputs), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_kimis_names_compile(device: str) -> None:
    """Also with a flat dt_bias, and without a gate."""
    inputs = make_inputs(CASES[1], device)
    bound = inputs.pop("gate_lower_bound")
    inputs["dt_bias"] = inputs["dt_bias"].flatten()
    torch._dynamo.reset()
    compiled = torch.compile(gdn.kimi_delta_attention, fullgraph=True, backend="eager")
    o = compiled(**inputs, lower_bound=bound, backend="torch").o
    expected = gdn.kimi_delta_attention(**inputs, lower_bound=bound, backend="torch")
    assert torch.equal(o, expected.o)
    plain = make_inputs(Case("no gate", T=5), device) | {"g": None}
    compiled = torch.compile(gdn.gated_delta_net, fullgraph=True, backend="eager")
    expected = gdn.gated_delta_net(**plain, backend="torch")
    assert torch.equal(compiled(**plain, backend="torch").o, expected.o)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_data(kind: str) -> None:
    """Shapes, dtypes and gradients; decode; `explain` and `warmup`."""
    inputs, step = make_inputs(CASES[1]), make_step(StepCase("step", B=2, per_channel=True))
    with FakeTensorMode() as mode:
        pass

    def strip(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to("meta") if kind == "meta" else mode.from_tensor(x)

    bare, bare_step = ({n: strip(x) for n, x in y.items()} for y in (inputs, step))
    leaves = {n: x.requires_grad_() for n, x in bare.items() if n in LEAVES}
    o, state = gdn.gated_delta_net(**bare | leaves)
    expected = gdn.gated_delta_net(**inputs, backend="torch")
    assert (o.shape, state.shape) == (expected.o.shape, expected.final_state.shape)
    (o.sum() + state.sum()).backward()
    assert all(x.grad.shape == x.shape for x in leaves.values())
    o = gdn.gated_delta_net_decode(**bare_step)
    assert o.shape == step["v"].shape
    for kwargs in (bare, bare_step):
        assert gdn.explain(**kwargs).chosen == "torch"
        assert gdn.warmup(**kwargs, backend="torch") == "torch"
