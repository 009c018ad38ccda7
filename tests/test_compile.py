"""torch.compile: one trace serves all similar calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gdn
from gdn import registry
from gdn.testing import Case, make_inputs, with_gradients


def test_compiles_with_dynamic_shapes(device: str) -> None:
    def function(inputs: dict[str, Any]) -> torch.Tensor:
        return gdn.gated_delta_net(**inputs, backend="torch").o

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (70, 130, 200):
        inputs = make_inputs(Case("dynamic", T=T), device)
        assert torch.equal(compiled(inputs), function(inputs))


def test_compiles_once_for_lengths_that_vary(device: str) -> None:
    """Of forward and backward, although their buffers depend on the number of chunks."""
    from torch._dynamo.testing import CompileCounterWithBackend

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gdn.gated_delta_net, fullgraph=True, dynamic=True, backend=graphs)
    torch._dynamo.reset()
    for T in (70, 130, 200, 260, 330):
        inputs = with_gradients(make_inputs(Case("dynamic", T=T), device))
        compiled(**inputs, backend="torch").o.sum().backward()
    assert graphs.frame_count <= 2  # the first length may have its own graph


def test_former_names_compile(device: str) -> None:
    inputs = make_inputs(Case("former", T=5, initial_state=False), device)
    compiled = torch.compile(gdn.gated_delta_net, fullgraph=True, backend="eager")
    o = compiled(**inputs, backend="torch", transpose_state_layout=True).o
    assert torch.equal(o, gdn.gated_delta_net(**inputs, backend="torch").o)


def test_compiled_call_keeps_the_request_it_was_traced_under(device: str) -> None:
    inputs = make_inputs(Case("request", T=5), device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: gdn.gated_delta_net(**inputs).o, fullgraph=True, backend="eager"
    )
    with gdn.use_backend("torch"):
        expected = compiled()
    assert torch.equal(compiled(), expected)


def test_a_graph_runs_in_another_process(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's cache may hand it one in which the backend is pinned, but not yet there."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    found = {}

    def record(graph: Any, inputs: object) -> Any:
        for node in graph.graph.nodes:
            if "gdn." in str(node.target):
                (found[str(node.target)],) = (x for x in node.args if isinstance(x, str))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(gdn.gated_delta_net, fullgraph=True, backend=backend)
    inputs = with_gradients(make_inputs(Case("named", T=5, dtype=torch.float64), device))
    compiled(**inputs, backend="triton,torch").o.sum().backward()
    (request,) = set(found.values())
    assert found.keys() == {"gdn.forward.default", "gdn.backward.default"}
    assert request == registry.pin(registry.find_backend("torch"))
    monkeypatch.setattr(registry, "_pinned", {})
    assert registry.find_backend(request).name == "torch"
    with pytest.raises(gdn.UnknownBackendError, match="unknown backend 'trch'"):
        registry.find_backend("trch#0")
