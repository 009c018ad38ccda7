"""Raw gates in patched layers: gdn activates them, results and caches stay as they are, and where
raw gates cannot be had the layer's own forward runs."""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gdn
from gdn.registry import find_backend
from gdn.testing import TOLERANCE, relative_error

pytest.importorskip("transformers", reason="transformers is not installed")
models = importlib.import_module("models")
integration = importlib.import_module("gdn.integrations.transformers")
functions = importlib.import_module("gdn.integrations.transformers_functions")
gates = importlib.import_module("gdn.integrations.transformers_gates")

plain = models.plain  # fixture
LAUNCHES = {
    "qwen3_next": 28, "qwen3_5": 23, "qwen3_5_moe": 23, "qwen4_exp": 23, "olmo_hybrid": 26,
    "lara_mini": 23,
}  # fmt: skip
"""Operations of a decode step in bfloat16 that would launch a kernel, where PyTorch runs the
convolution (4) and the norm (11). With gates in PyTorch 8 more, in OLMo Hybrid 9."""


@pytest.fixture(params=LAUNCHES)
def kind(request: pytest.FixtureRequest) -> str:
    """A model whose layers call functions of their module."""
    if not models.keeps_packed_apart(request.param):
        pytest.skip("this transformers keeps its functions elsewhere")
    return str(request.param)


class Seen(TorchDispatchMode):
    """The names of the operations that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **kwargs or {})

    @property
    def activated(self) -> bool:
        """Whether PyTorch computed gates."""
        return not {"softplus", "sigmoid", "exp"}.isdisjoint(self.names)


def make_cache(kind: str) -> Any:
    return importlib.import_module("transformers").DynamicCache(config=models.make_config(kind))


def run(layer: Any, x: Tensor, cache: Any) -> Tensor:
    name = {"cache", "cache_params"} & set(inspect.signature(type(layer).forward).parameters)
    y: Tensor = layer(x, **{name.pop(): cache})
    return y


@torch.no_grad()
def watch_step(kind: str, dtype: torch.dtype = torch.float32) -> Seen:
    """The second decode step of a layer."""
    layer, cache = models.make_layer(kind, "cpu").to(dtype), make_cache(kind)
    x = torch.randn(2, 7, 32, dtype=dtype)
    for piece in x.split([5, 1, 1], 1):
        with Seen() as seen:
            run(layer, piece, cache)
    return seen


def test_gdn_activates_the_gates_of_a_step(kind: str) -> None:
    assert watch_step(kind).activated
    with integration.patch(backend="torch"):
        seen = watch_step(kind, torch.bfloat16)
    assert not seen.activated
    assert len(seen.names) <= LAUNCHES[kind], seen.names


def test_gdn_activates_the_gates_of_sequences_with_gradients(kind: str) -> None:
    layer, x = models.make_layer(kind, "cpu"), torch.randn(2, 5, 32)
    with integration.patch(layer, backend="torch"), Seen() as seen:
        layer(x).sum().backward()
    assert not seen.activated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 3])
def test_steps_and_states_before_and_after_unpatch(kind: str, B: int, dtype: torch.dtype) -> None:
    """A prompt, steps, a longer piece and steps again; the last ones unpatched, from the cache that
    the patched layer has left."""
    layer = models.make_layer(kind, "cpu").to(dtype)
    exact = models.make_layer(kind, "cpu").to(dtype).float()
    x = torch.randn(B, 14, 32).to(dtype)
    caches = [make_cache(kind) for _ in range(3)]
    with torch.no_grad():
        for number, piece in enumerate(x.split([5, 1, 1, 4, 1, 1, 1], 1)):
            truth = run(exact, piece.float(), caches[0])
            expected = run(layer, piece, caches[1])
            patch = integration.patch(layer, backend="torch") if number < 5 else None
            got = run(layer, piece, caches[2])
            if patch is not None:
                patch.__exit__(None, None, None)
            check(got, expected, truth, dtype)
            for name in ("conv_states", "recurrent_states"):
                states = [getattr(cache.layers[0], name)[0] for cache in caches]
                assert states[2].dtype == states[1].dtype
                check(states[2], states[1], states[0], dtype)


def check(got: Tensor, expected: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    bound = max(TOLERANCE[dtype], 2 * relative_error(expected, truth))
    assert relative_error(got, truth) <= bound


def test_a_step_has_gradients_of_the_gates_parameters() -> None:
    """Even if nothing else wants any: the decode op, which has none, does not run."""
    torch.manual_seed(0)
    q, v, a, b = (torch.randn(1, 1, *size) for size in ((2, 16), (4, 24), (4,), (4,)))
    layer = torch.nn.Module()
    layer.A_log, layer.dt_bias = (torch.nn.Parameter(torch.randn(4)) for _ in range(2))
    g, beta = -layer.A_log.exp() * torch.nn.functional.softplus(a + layer.dt_bias), b.sigmoid()
    state = {"initial_state": torch.randn(1, 4, 16, 24)}
    expected, _ = functions.run(True, "torch", q, q, v, g, beta, **state)
    got, _ = functions.run(True, "torch", q, q, v, a, b, raw_gates_of=layer, **state)
    results = [[o, *torch.autograd.grad(o.sum(), [*layer.parameters()])] for o in (got, expected)]
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) <= TOLERANCE[torch.float32]


def test_the_last_of_several_patches_ends_it(kind: str) -> None:
    owner = getattr(models.modelling(kind), integration.MODELS[kind].layer)
    before = owner.forward
    first, second = (integration.patch(backend="torch") for _ in range(2))
    first.__exit__(None, None, None)
    assert not watch_step(kind).activated
    second.__exit__(None, None, None)
    assert watch_step(kind).activated
    assert owner.forward is before


@pytest.mark.usefixtures("clean_registry")
def test_a_backend_without_raw_gates_gets_activated_ones(kind: str) -> None:
    """In steps and in sequences, with equal results."""
    torch_backend = type(find_backend("torch"))
    able = torch_backend.capabilities
    flags = able.flags - {"use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"}
    limits = {"name": "activated", "capabilities": replace(able, flags=flags)}
    gdn.register_backend(type("Activated", (torch_backend,), limits)())
    layer, x, found = models.make_layer(kind, "cpu"), torch.randn(2, 7, 32), []
    for backend in ("torch", "activated"):
        cache = make_cache(kind)
        with integration.patch(layer, backend=backend), torch.no_grad():
            found.append([run(layer, piece, cache) for piece in x.split([5, 1, 1], 1)])
    with integration.patch(backend="activated"):
        assert watch_step(kind).activated
    for one, other in zip(*found, strict=True):
        assert relative_error(other, one) <= TOLERANCE[torch.float32]


def test_wrapped_and_unknown_forwards_stay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's wrapper is called; a source that does more with the gates is left alone."""
    owner = getattr(models.modelling(kind), integration.MODELS[kind].layer)
    forward, calls = owner.forward, []

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return forward(*args, **kwargs)

    assert gates.with_raw_gates(forward) is not None
    monkeypatch.setattr(owner, "forward", wrapped)
    with integration.patch(backend="torch"):
        assert owner.forward is wrapped
        assert watch_step(kind).activated
    assert calls
    source, first = inspect.getsourcelines(inspect.unwrap(forward))
    changes = (("g=g,", "g=2 * g,"), (".sigmoid()", ".tanh()"), ("beta=beta,", "beta=beta * 1,"))
    for old, new in changes:
        changed = [line.replace(old, new) for line in source]
        assert changed != source
        gates._rewrite.cache_clear()
        monkeypatch.setattr(inspect, "getsourcelines", lambda _, c=changed: (c, first))
        assert gates.with_raw_gates(forward) is None
    monkeypatch.undo()
    gates._rewrite.cache_clear()


def test_heads_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers of transformers 5.17 do: the second forward has as many lines without it."""
    if not models.keeps_packed_apart("qwen3_5"):
        pytest.skip("this transformers keeps its functions elsewhere")
    forward = models.modelling("qwen3_5").Qwen3_5GatedDeltaNet.forward
    source, first = inspect.getsourcelines(inspect.unwrap(forward))
    ratio, indent = "self.num_v_heads // self.num_k_heads", " " * 8
    head = f"{indent}if {ratio} > 1:\n"
    block = [f"{indent}    {x} = {x}.repeat_interleave({ratio}, dim=2)\n" for x in ("query", "key")]
    once = [line for line in source if line not in (head, *block)]
    place = once.index(f"{indent}beta = b.sigmoid()\n")
    changed = [*once[:place], head, *block, *once[place:]]
    gates._rewrite.cache_clear()
    monkeypatch.setattr(inspect, "getsourcelines", lambda _: (changed, first))
    code = inspect.unwrap(gates.with_raw_gates(forward)).__code__
    assert "repeat_interleave" not in code.co_names
    assert max(line for *_, line in code.co_lines() if line) == first + len(changed) - 1
    monkeypatch.undo()
    gates._rewrite.cache_clear()


def test_a_function_in_the_place_of_gdns_gets_activated_gates(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = models.modelling(kind), "torch_recurrent_gated_delta_rule"
    own = getattr(module, name)
    with integration.patch(backend="torch"):
        monkeypatch.setattr(module, name, own)
        assert watch_step(kind).activated


def test_a_function_that_wraps_gdns_gets_activated_gates(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`functools.wraps` hands on the mark of gdn's function."""
    module, name = models.modelling(kind), "torch_recurrent_gated_delta_rule"
    own = inspect.unwrap(getattr(module, name))
    with integration.patch(backend="torch"):

        @functools.wraps(getattr(module, name))
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)
        assert watch_step(kind).activated


def test_the_patch_may_end_within_a_layer(kind: str) -> None:
    layer, x = models.make_layer(kind, "cpu"), torch.randn(2, 5, 32)
    expected = layer(x)
    integration.patch(layer, backend="torch")
    for part in layer.children():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda *_: integration.unpatch())
    assert relative_error(layer(x), expected) <= TOLERANCE[torch.float32]


def test_what_has_taken_the_place_of_a_patch_stays(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gdn's replacement, put back after its end, is patched and unpatched like any other."""
    owner = getattr(models.modelling(kind), integration.MODELS[kind].layer)
    before = owner.forward
    monkeypatch.setattr(owner, "forward", before)
    with integration.patch(backend="torch"):
        ours, owner.forward = owner.forward, lambda *_: None
    assert owner.forward not in (ours, before)
    owner.forward = ours
    with integration.patch(backend="torch"):
        assert not watch_step(kind).activated
    assert owner.forward is before


def test_compiled_layers_keep_their_gates(kind: str) -> None:
    """In one graph, where Inductor fuses them."""
    layer, x = models.make_layer(kind, "cpu"), torch.randn(2, 5, 32)
    found: list[str] = []

    def inspect_graph(graph: Any, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with integration.patch(layer, backend="torch"), torch.no_grad():
        expected = layer(x)
        got = torch.compile(layer, fullgraph=True, backend=inspect_graph)(x)
    assert any("softplus" in name for name in found)
    assert relative_error(got, expected) <= TOLERANCE[torch.float32]


def test_errors_name_the_lines_of_transformers(kind: str) -> None:
    forward = getattr(models.modelling(kind), integration.MODELS[kind].layer).forward
    raw, own = (inspect.unwrap(x).__code__ for x in (gates.with_raw_gates(forward), forward))
    assert raw is not own
    assert raw.co_filename == own.co_filename
    first, last = (
        [f(line for *_, line in x.co_lines() if line) for x in (raw, own)] for f in (min, max)
    )
    assert first[0] == first[1]
    assert last[0] == last[1]
