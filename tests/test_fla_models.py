"""Models over fla's functions while gdn is registered there: transformers' unpatched, and fla's own
layers and models (flash-linear-attention, which needs a GPU but for the layers' core)."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdn.testing import TOLERANCE, relative_error

for name in ("fla", "triton", "transformers"):
    pytest.importorskip(name, reason=f"{name} is not installed")
models = importlib.import_module("models")
kimi = importlib.import_module("test_transformers_kimi")


@pytest.fixture
def integration() -> Iterator[Any]:
    """The module, with gdn not yet registered; afterwards fla is as before."""
    module = importlib.import_module("gdn.integrations.fla")
    module.unregister()
    yield module
    module.unregister()


@pytest.fixture
def counted(integration: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The entries of fla that gdn ran, in order: "chunk" or "step"."""
    seen: list[str] = []
    run = integration._run

    def count(entry: Any, *given: Any) -> Any:
        seen.append("step" if entry.step else "chunk")
        return run(entry, *given)

    monkeypatch.setattr(integration, "_run", count)
    return seen


def from_fla(name: str) -> ModuleType:
    """A module of flash-linear-attention, which fla-core comes without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="flash-linear-attention is not installed")


@pytest.mark.parametrize("kind", [*models.CLASSES, *kimi.CLASSES])
def test_unpatched_transformers_reach_gdn_through_fla(
    integration: Any, counted: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers calls fla where fla is installed, here on a CPU: the numbers are those of
    transformers' own PyTorch code, gradients and cached tokens too."""
    per_channel = kind in kimi.CLASSES
    if not (per_channel or models.keeps_packed_apart(kind)):
        pytest.skip("layers of this transformers keep their functions")
    model = kimi.make_model(kind) if per_channel else models.make_model(kind, "cpu")
    inputs, pieces = models.padded("cpu"), (30, 1, 1, 4)
    with integration.register("torch"):
        got = kimi.results_and_gradients(model, inputs)
        assert set(counted) == {"chunk"}
        parts = kimi.run_pieces(model, inputs["input_ids"], pieces)
        assert counted.count("step") >= 2
    if per_channel:
        kimi.make_plain(monkeypatch)
    else:
        models.make_plain(monkeypatch)
    ran = len(counted)
    expected = kimi.results_and_gradients(model, inputs)
    assert not all(torch.equal(got[n], x) for n, x in expected.items())
    for name, x in expected.items():
        assert relative_error(got[name], x) <= TOLERANCE[torch.float32], name
    plain = kimi.run_pieces(model, inputs["input_ids"], pieces)
    for one, other in zip(parts, plain, strict=True):
        assert relative_error(one, other) <= TOLERANCE[torch.float32]
    assert len(counted) == ran


class GatedNorm(nn.Module):
    """In the place of fla's norm, whose kernel needs a GPU."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = nn.functional.rms_norm(x, x.shape[-1:])
        return x if gate is None else x * gate.sigmoid()


@pytest.mark.parametrize("kind", ["GatedDeltaNet", "KimiDeltaAttention"])
def test_flas_layers_on_a_cpu(integration: Any, counted: list[str], kind: str) -> None:
    """Without their short convolution: training and generation agree, and packed sequences with
    each alone."""
    layers = from_fla("fla.layers")
    sizes = {"hidden_size": 32, "head_dim": 16, "num_heads": 2, "num_v_heads": 4, "expand_v": 1}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the convolution matters
        layer = getattr(layers, kind)(**sizes, use_short_conv=False, layer_idx=0).eval()
    layer.o_norm = GatedNorm()
    x = torch.randn(1, 50, 32)
    with integration.register("torch"):
        chunked, *_ = layer(x)
        assert counted == ["chunk"]
        with torch.no_grad():
            stepped, *_ = layer(x)
            bounds = torch.tensor([0, 20, 50], dtype=torch.int32)
            packed, *_ = layer(x, cu_seqlens=bounds)
            alone = [layer(part)[0] for part in x.split((20, 30), 1)]
        assert counted == ["chunk", *["step"] * 4]
        chunked.square().mean().backward()
    assert layer.A_log.grad.abs().sum() > 0
    assert relative_error(stepped, chunked) <= TOLERANCE[torch.float32]
    assert relative_error(packed, torch.cat(alone, 1)) <= TOLERANCE[torch.float32]


BACKENDS = [("GatedDeltaNet", x) for x in (None, "triton", "fla")] + [("KDA", "torch")]
LAYERS = 4
GREEDY = {"do_sample": False, "pad_token_id": 0}


def make_fla_model(kind: str, dtype: torch.dtype) -> Any:
    """A tiny model of fla's, with heads that every backend takes."""
    module = from_fla("fla.models")
    sizes = {"hidden_size": 256, "head_dim": 64, "num_heads": 4, "expand_v": 1, "vocab_size": 64}
    sizes |= {"intermediate_size": 128, "fuse_cross_entropy": False, "num_hidden_layers": LAYERS}
    config = getattr(module, f"{kind}Config")(**sizes, eos_token_id=None, initializer_range=0.1)
    torch.manual_seed(0)
    return getattr(module, f"{kind}ForCausalLM")(config).to("cuda", dtype).eval()


def draw_ids(T: int) -> Tensor:
    return torch.randint(64, (2, T), generator=torch.Generator().manual_seed(1)).cuda()


def join_layers(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of all layers together, since A_log and dt_bias of one are few numbers."""
    joined: dict[str, list[Tensor]] = {}
    for name, x in found.items():
        joined.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(x.flatten())
    return {name: torch.cat(parts) for name, parts in joined.items()}


def within(got: Tensor, expected: Tensor, truth: Tensor, what: str) -> None:
    """As exact as without gdn, but for a factor of 2."""
    bound = max(TOLERANCE[torch.bfloat16], 2 * relative_error(expected, truth))
    assert relative_error(got, truth) <= bound, what


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "backend"), BACKENDS)
def test_flas_models_forward_and_backward(
    integration: Any, counted: list[str], kind: str, backend: str | None
) -> None:
    """Against fla alone, in float32."""
    model, inputs = make_fla_model(kind, torch.bfloat16), {"input_ids": draw_ids(200)}
    with integration.register(backend):
        got = models.run_all(model, [inputs])
    assert counted == ["chunk"] * LAYERS
    expected = models.run_all(model, [inputs])
    assert len(counted) == LAYERS
    got, expected = join_layers(got), join_layers(expected)
    for name, x in join_layers(models.run_all(model.float(), [inputs])).items():
        within(got[name], expected[name], x, name)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "backend"), BACKENDS)
def test_flas_models_generate(
    integration: Any, counted: list[str], kind: str, backend: str | None
) -> None:
    """Cached pieces as with fla alone; and generated tokens are those that fla alone ranks first,
    or as good as."""
    model, ids = make_fla_model(kind, torch.bfloat16), draw_ids(140)
    lengths = (70, 1, 1, 30)
    with integration.register(backend):
        got = models.run_pieces(model, ids, lengths)
        assert counted == [*["chunk"] * LAYERS, *["step"] * 3 * LAYERS]
        prompt, whole = ids[:, :20], torch.ones_like(ids[:, :20])  # token 0 is no padding here
        written = model.generate(prompt, attention_mask=whole, max_new_tokens=6, **GREEDY)
        assert counted.count("step") >= (3 + 6) * LAYERS
    ran = len(counted)
    expected = models.run_pieces(model, ids, lengths)
    with torch.no_grad():
        logits = model(written).logits[:, 19:-1].float()
    truth = models.run_pieces(model.float(), ids, lengths)
    assert len(counted) == ran
    for number, x in enumerate(truth):
        within(got[number], expected[number], x, f"piece {number}")
    chosen = logits.gather(-1, written[:, 20:, None])[..., 0]
    assert ((logits.amax(-1) - chosen) <= 0.05 * logits.std()).all()
