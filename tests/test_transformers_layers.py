"""What `patch` does beside the delta rule in transformers' layers: kernels for the convolution and
the gated norm, states in place, and decode in one compiled graph."""

from __future__ import annotations

import importlib
from typing import Any

import layer_kernels
import pytest
import torch

from gdn import convolution, gated_norm
from gdn.testing import TOLERANCE, relative_error

pytest.importorskip("transformers", reason="transformers is not installed")
models = importlib.import_module("models")
kimi = importlib.import_module("test_transformers_kimi")
integration = importlib.import_module("gdn.integrations.transformers")

plain, fla_kernels = models.plain, layer_kernels.fla_kernels  # fixtures
TIGHT = TOLERANCE[torch.float32]


def make_model(kind: str, device: str) -> Any:
    if kind in kimi.CLASSES:
        return kimi.make_model(kind).to(device)
    return models.make_model(kind, device)


@pytest.mark.parametrize("kind", ["qwen3_5", "kimi_linear"])
def test_a_model_on_kernels(
    monkeypatch: pytest.MonkeyPatch, device: str, kind: str, fla_kernels: Any
) -> None:
    """Packed sequences with gradients, and steps through a cache; Kimi's gate is a sigmoid. On a
    CPU Triton's interpreter runs the kernels."""
    if not models.keeps_packed_apart(kind):
        pytest.skip("this transformers is refused packed sequences")
    kimi.make_plain(monkeypatch)
    model, (packed, alone) = make_model(kind, device), models.make_packed(device)
    expected = models.run_all(model, alone)
    pieces = models.run_pieces(model, packed["input_ids"], (6, 1, 1))
    layer_kernels.choose_kernels(monkeypatch)
    ran = set()
    for module, name in (
        (convolution, "short_convolution"), (convolution, "convolve_step"),
        (gated_norm, "gated_rms_norm"),
    ):  # fmt: skip
        function = getattr(module, name)

        def counted(*args: Any, name: str = name, function: Any = function, **kw: Any) -> Any:
            ran.add(name)
            return function(*args, **kw)

        monkeypatch.setattr(module, name, counted)
    with integration.patch(model, backend="torch"):
        got = models.run_all(model, [packed])
        got_pieces = models.run_pieces(model, packed["input_ids"], (6, 1, 1))
    assert ran == {"short_convolution", "convolve_step", "gated_rms_norm"}
    for name, x in expected.items():
        assert relative_error(got[name], x) <= TIGHT, name
    for one, other in zip(got_pieces, pieces, strict=True):
        assert relative_error(one, other) <= TIGHT


def test_a_step_writes_the_caches_state_in_place(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """No copy of a state is made: the recurrent function returns the tensor that it was given."""
    if not models.keeps_packed_apart("qwen3_5"):
        pytest.skip("this transformers keeps its functions elsewhere")
    model, module = make_model("qwen3_5", device), models.modelling("qwen3_5")
    ids = models.padded(device, 9)["input_ids"]
    found = []
    with integration.patch(model, backend="torch"):
        function = module.torch_recurrent_gated_delta_rule

        def recorded(*args: Any, initial_state: Any, **kw: Any) -> Any:
            before = initial_state.clone()
            o, state = function(*args, initial_state=initial_state, **kw)
            found.append(state is initial_state and not torch.equal(state, before))
            return o, state

        monkeypatch.setattr(module, "torch_recurrent_gated_delta_rule", recorded)
        models.run_pieces(model, ids, (7, 1, 1))
        monkeypatch.undo()
    linear = sum(type(layer).__name__ == "Qwen3_5GatedDeltaNet" for layer in model.modules())
    assert found == [True] * 2 * linear


def test_decode_compiles_into_one_graph(device: str) -> None:
    """Steps through a static cache, without a graph break: the tokens of eager steps."""
    if not models.keeps_packed_apart("qwen3_5"):
        pytest.skip("this transformers is too old")
    from transformers import StaticCache

    model = make_model("qwen3_5", device)
    ids, name = models.padded(device, 20)["input_ids"], models.cache_name(model)

    def generate(step: Any) -> list[torch.Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=32)
        logits = [model(ids, **{name: cache}, use_cache=True).logits[:, -1:]]
        for _ in range(3):
            out = step(logits[-1].argmax(-1), **{name: cache}, use_cache=True)
            logits.append(out.logits.clone())
        return logits

    with torch.no_grad():
        unpatched = generate(model)
        with integration.patch(model, backend="torch"):
            compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
            got = generate(compiled)
    for one, other in zip(got, unpatched, strict=True):
        assert relative_error(one, other) <= TIGHT
