"""torch.ops.gdn inside PyTorch: opcheck, torch.compile, autocast, no_grad, profilers, CUDA
graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from support import assert_close, require
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import gdn
from gdn.problem import Call
from gdn.testing import Case, make_inputs, with_gradients
from gdn.testing.decode import STEPS, make_step

CASES = [
    Case("dense", T=70, HV=4),
    Case("packed-fused", lengths=(70, 0, 5), fused=True, state_v_first=True),
]
NAMES = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")


@pytest.fixture
def dense(dtype: torch.dtype) -> Case:
    return replace(CASES[0], dtype=dtype)


def as_call(inputs: dict[str, Any]) -> Call:
    return Call(**{"scale": inputs["q"].shape[-1] ** -0.5} | inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(
    backend: str, device: str, dtype: torch.dtype, case: Case, needs_grad: bool
) -> None:
    inputs = make_inputs(replace(case, dtype=dtype), device)
    inputs = with_gradients(inputs) if needs_grad else inputs
    require(backend, inputs)
    call = as_call(inputs)
    torch.library.opcheck(torch.ops.gdn.forward.default, (*call, backend, needs_grad))
    with torch.no_grad():
        o, state, saved = torch.ops.gdn.forward(*call, backend, True)
    plain = Call(*(x.detach() if isinstance(x, torch.Tensor) else x for x in call))
    grads = (torch.randn_like(o), torch.randn_like(state))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.gdn.backward.default, (*plain, backend, saved, *grads), test_utils=tests
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_into_one_node_without_a_break(
    backend: str, device: str, dtype: torch.dtype, case: Case
) -> None:
    inputs = with_gradients(make_inputs(replace(case, dtype=dtype), device))
    require(backend, inputs)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(inputs: dict[str, Any]) -> torch.Tensor:
        o, state = gdn.gated_delta_net(**inputs, backend=backend)
        return o.sum() + state.square().sum()

    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, backend=record)(inputs)
    ops = [n.target for graph in graphs for n in graph.graph.nodes if n.op == "call_function"]
    assert sum("gdn" in str(op) for op in ops) == 1
    assert len(graphs) == 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    names = [name for name in NAMES if inputs.get(name) is not None]
    got = torch.autograd.grad(compiled(inputs), [inputs[n] for n in names])
    expected = torch.autograd.grad(step(inputs), [inputs[n] for n in names])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast_casts_q_k_v_alone(backend: str, device: str) -> None:
    inputs = with_gradients(make_inputs(Case("autocast", T=70), device))
    low = dict(inputs)
    low |= {name: inputs[name].detach().bfloat16().requires_grad_() for name in ("q", "k", "v")}
    require(backend, low)
    with torch.autocast(device, torch.bfloat16):
        o, state = gdn.gated_delta_net(**inputs, backend=backend)
        (o.float().sum() + state.sum()).backward()
    expected = gdn.gated_delta_net(**low, backend=backend)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, expected.o)
    assert torch.equal(state, expected.final_state)
    assert inputs["q"].grad.dtype == torch.float32


def test_no_grad_keeps_nothing_for_backward(backend: str, device: str, dense: Case) -> None:
    inputs = with_gradients(make_inputs(dense, device))
    require(backend, inputs)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not gdn.gated_delta_net(**inputs, backend=backend).o.requires_grad
    assert gdn.gated_delta_net(**inputs, backend=backend).o.requires_grad


def test_gradients_only_where_asked_for(backend: str, device: str, dense: Case) -> None:
    inputs = make_inputs(dense, device)
    inputs["k"].requires_grad_()
    require(backend, inputs)
    expected = with_gradients(make_inputs(dense, device))
    for kwargs in (inputs, expected):
        gdn.gated_delta_net(**kwargs, backend=backend).o.sum().backward()
    assert inputs["q"].grad is None
    assert_close("k", inputs["k"].grad, expected["k"].grad, dense.dtype)


def test_double_backward_is_refused_clearly(backend: str, device: str, dense: Case) -> None:
    inputs = with_gradients(make_inputs(dense, device))
    require(backend, inputs)
    o = gdn.gated_delta_net(**inputs, backend=backend).o
    (dq,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(dq.sum(), inputs["q"])


class Seen(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **kwargs or {})


class Subclass(torch.Tensor):
    """A tensor that records the functions that get it."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def forward_and_decode(device: str, **changes: Any) -> None:
    inputs, step = make_inputs(CASES[0], device), make_step(STEPS[0], device)
    gdn.gated_delta_net(**inputs | changes, backend="torch")
    gdn.gated_delta_net_decode(**step, backend="torch")


def test_modes_profilers_subclasses_and_tracers_see_the_op(device: str) -> None:
    """A plain call skips PyTorch's dispatcher. With any of these the call must go through it."""
    with Seen() as seen:
        forward_and_decode(device)
    assert {"gdn.forward.default", "gdn.decode.default"} <= set(seen.names)

    with torch.profiler.profile(acc_events=True) as profile:
        forward_and_decode(device)
    assert {"gdn::forward", "gdn::decode"} <= {event.key for event in profile.key_averages()}

    Subclass.seen.clear()
    v = make_inputs(CASES[0], device)["v"].as_subclass(Subclass)  # type: ignore[arg-type]
    forward_and_decode(device, v=v)
    assert any("gdn.forward" in name for name in Subclass.seen)

    inputs = make_inputs(CASES[0], device)
    graph = make_fx(lambda v: gdn.gated_delta_net(**inputs | {"v": v}, backend="torch").o)
    targets = [str(node.target) for node in graph(inputs["v"]).graph.nodes]
    assert targets.count("gdn.forward.default") == 1

    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(x) if torch.is_tensor(x) else x for k, x in inputs.items()}
    assert gdn.gated_delta_net(**fakes, backend="torch").o.shape == inputs["v"].shape


def test_a_plain_call_equals_a_dispatched_one(backend: str, device: str, dense: Case) -> None:
    """With and without PyTorch's dispatcher the result has the same bits."""
    inputs = make_inputs(dense, device)
    require(backend, inputs)
    plain = gdn.gated_delta_net(**inputs, backend=backend)
    with Seen() as seen:
        dispatched = gdn.gated_delta_net(**inputs, backend=backend)
    assert "gdn.forward.default" in seen.names
    assert all(torch.equal(a, b) for a, b in zip(plain, dispatched, strict=True))


def test_checkpointing_gives_the_same_gradients(backend: str, device: str, dense: Case) -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = with_gradients(make_inputs(dense, device))
    require(backend, inputs)

    def function(v: torch.Tensor) -> torch.Tensor:
        return gdn.gated_delta_net(**inputs | {"v": v}, backend=backend).o.square().sum()

    (plain,) = torch.autograd.grad(function(inputs["v"]), inputs["v"])
    (again,) = torch.autograd.grad(
        checkpoint(function, inputs["v"], use_reentrant=False), inputs["v"]
    )
    assert torch.equal(plain, again)


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph(backend: str) -> None:
    """Forward and backward together, replayed on new data."""
    capabilities = next(i.capabilities for i in gdn.list_backends() if i.name == backend)
    if not capabilities.cuda_graph:
        pytest.skip("does not claim CUDA graphs")
    case = Case("graph", T=200, HV=4, dtype=torch.bfloat16)
    inputs = with_gradients(make_inputs(case, "cuda"))
    require(backend, inputs)
    leaves = [inputs[name] for name in NAMES[:6]]

    def step() -> list[torch.Tensor]:
        o, state = gdn.gated_delta_net(**inputs, backend=backend)
        grads = torch.autograd.grad(o.float().sum() + state.sum(), leaves)
        return [o.detach(), state.detach(), *grads]  # no autograd graph outlives the stream

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = make_inputs(case, "cuda", seed=4)
    with torch.no_grad():
        for name in NAMES[:6]:
            inputs[name].copy_(fresh[name])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
