"""transformers' models with a decay per channel, tiny and random: gdn changes none of their
numbers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdn.testing import TOLERANCE, relative_error

pytest.importorskip("transformers", reason="transformers is not installed")
models = importlib.import_module("models")
integration = importlib.import_module("gdn.integrations.transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "initializer_range": 0.1,
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "dense"],
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
INDEXED: dict[str, Any] = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "q_lora_rank": 16,
    "qk_rope_head_dim": 0,
    "index_topk": 128,  # all tokens, so that rounding cannot change the choice
    "index_head_dim": 16,
    "index_n_heads": 2,
    "hc_mult": 2,
}
CLASSES = {  # configuration, model, more sizes. GLM-5-Next's text model has no head of its own
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", HYBRID),
    "bailing_hybrid": (
        "BailingHybridConfig",
        "BailingHybridForCausalLM",
        HYBRID | {"head_dim": 16},
    ),
    "glm5_next": ("Glm5NextTextConfig", "Glm5NextTextModel", INDEXED),
}
FUNCTIONS = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")


def make_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers run its own PyTorch code, even if fla is installed."""
    for module in filter(None, map(models.find_modelling, CLASSES)):
        for name in FUNCTIONS:
            monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unpatched means transformers' own PyTorch; and no test leaves a patch behind."""
    make_plain(monkeypatch)
    yield
    integration.unpatch()


@pytest.fixture(params=CLASSES)
def kind(request: pytest.FixtureRequest) -> str:
    models.modelling(request.param)
    return request.param


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with slowly decaying gates."""
    module = models.modelling(kind)
    configuration = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
    config, model, more = CLASSES[kind]
    torch.manual_seed(0)
    made = getattr(module, model)(getattr(configuration, config)(**SIZES | more))
    for name, parameter in made.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            nn.init.uniform_(parameter, -2, 0)
    return made.to(dtype).eval()


def result(out: Any) -> Tensor:
    """Logits, or the last layer's output of a model without a head."""
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def results_and_gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients are those of a random weighted sum; the squares of a normalised output would
    add up to a constant."""
    model.zero_grad()
    out = result(model(**inputs, use_cache=False))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out.float() * weights).mean().backward()
    gradients = {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}
    return {"out": out.detach()} | gradients


@torch.no_grad()
def run_pieces(model: Any, ids: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Results of consecutive pieces through one cache."""
    name, cache, outputs = models.cache_name(model), None, []
    for piece in ids[:, : sum(lengths)].split(lengths, 1):
        out = model(piece, **{name: cache}, use_cache=True)
        cache = out[name]
        outputs.append(result(out))
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients(kind: str, dtype: torch.dtype) -> None:
    """Against the unpatched model in float32; in bfloat16 twice its own error will do."""
    model, inputs = make_model(kind, dtype), models.padded("cpu")
    expected = results_and_gradients(model, inputs)
    with integration.patch(model, backend="torch"):
        got = results_and_gradients(model, inputs)
    truth = results_and_gradients(model.float(), inputs)
    assert set(got) == set(expected)
    assert any("dt_bias" in name for name in got)
    # something else ran; in bfloat16 both may round alike
    assert dtype == torch.bfloat16 or not all(torch.equal(got[n], x) for n, x in expected.items())
    for name, x in truth.items():
        bound = max(TOLERANCE[dtype], 2 * relative_error(expected[name], x))
        assert relative_error(got[name], x) <= bound, name


def test_pieces_through_a_cache(kind: str) -> None:
    """Two long pieces, a token, and a few more: as unpatched."""
    model, ids = make_model(kind), models.padded("cpu")["input_ids"]
    expected = run_pieces(model, ids, (30, 30, 1, 1, 4))
    with integration.patch(model, backend="torch"):
        got = run_pieces(model, ids, (30, 30, 1, 1, 4))
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) <= TOLERANCE[torch.float32]
        assert not torch.equal(one, other)


def test_greedy_generation_with_cache(kind: str) -> None:
    model, inputs = make_model(kind), models.padded("cpu")
    if not hasattr(model, "generate"):
        pytest.skip("a model without a head")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    with integration.patch(model, backend="torch"):
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_patching_is_undone_and_seen_by_name(kind: str) -> None:
    model, module = make_model(kind), models.modelling(kind)
    names = (*FUNCTIONS, "causal_conv1d_fn")
    before = [getattr(module, name) for name in names]
    with integration.patch(model, backend="torch"):
        assert all(getattr(module, n) is not x for n, x in zip(names, before, strict=True))
    assert [getattr(module, name) for name in names] == before


def test_packed_sequences(kind: str) -> None:
    """Linear layers alone keep them apart: as each sequence by itself, unpatched."""
    model = make_model(kind)
    packed, alone = models.make_packed("cpu")
    linear = next(x for x in model.modules() if type(x).__name__ == integration.MODELS[kind].layer)
    x = torch.randn(1, packed["input_ids"].shape[1], SIZES["hidden_size"])
    bounds = packed["cu_seq_lens_q"].tolist()
    parts = [x[:, a:b] for a, b in pairwise(bounds) if b > a]
    assert len(parts) == len(alone)
    expected = torch.cat([linear(part) for part in parts], 1)
    with integration.patch(model, backend="torch"):
        got = linear(x, cu_seq_lens_q=packed["cu_seq_lens_q"])
    assert relative_error(got, expected) <= TOLERANCE[torch.float32]
