"""Tiny random models of transformers with a decay per head, for tests that need a real model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdn.integrations.transformers_models import MODELS

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "initializer_range": 0.1,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "num_experts": 2,
    "num_experts_per_tok": 2,  # all of them, so that rounding cannot change the choice
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 128,  # all tokens
    "indexer_compress_ratio": 2,
}
MORE_SIZES = {"olmo_hybrid": {"pad_token_id": 0, "eos_token_id": None}}
CLASSES = {  # configuration, model
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
    "qwen4_exp": ("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM"),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM"),
    "lara_mini": ("LaraMiniConfig", "LaraMiniForCausalLM"),
}
"""Of the `MODELS` with a decay per head; the others are in test_transformers_kimi.py."""


def find_modelling(kind: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    except ModuleNotFoundError:
        return None


def modelling(kind: str) -> Any:
    """The module of a model; skips the test if transformers does not have it."""
    return find_modelling(kind) or pytest.skip(f"no transformers with {kind} is installed")


def make_config(kind: str) -> Any:
    modelling(kind)
    configuration = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
    return getattr(configuration, CLASSES[kind][0])(**SIZES | MORE_SIZES.get(kind, {}))


def make_model(kind: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with slowly decaying gates. Those of a new model decay within a token or two."""
    torch.manual_seed(0)
    model = getattr(modelling(kind), CLASSES[kind][1])(make_config(kind))
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            nn.init.uniform_(parameter, -2, 0)
    return model.to(device, dtype).eval()


def make_layer(kind: str, device: str) -> Any:
    """A linear attention layer alone, every parameter random."""
    torch.manual_seed(0)
    layer = getattr(modelling(kind), MODELS[kind].layer)(make_config(kind), 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.to(device)


def make_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers run its own PyTorch code in full float32, even if fla is installed."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for module in filter(None, map(find_modelling, CLASSES)):
        for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
            function = getattr(module, name)
            monkeypatch.setattr(module, name, getattr(function, "__wrapped__", function))
        for name in (
            "chunk_gated_delta_rule",
            "fused_recurrent_gated_delta_rule",
            "FusedRMSNormGated",
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, None)


def cache_name(model: Any) -> str:
    """The name of the cache argument in the installed transformers."""
    accepted = inspect.signature(model.forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"


@torch.no_grad()
def run_pieces(
    model: Any, ids: Tensor, lengths: tuple[int, ...], packed: bool = False
) -> list[Tensor]:
    """Logits of consecutive pieces of these lengths through one cache. With `packed` each piece is
    passed as one packed sequence."""
    name = cache_name(model)
    cache, outputs = None, []
    for piece in ids[:, : sum(lengths)].split(lengths, 1):
        ends = torch.tensor([0, piece.shape[1]], dtype=torch.int32, device=ids.device)
        more = {"cu_seq_lens_q": ends} if packed else {}
        out = model(piece, **{name: cache}, use_cache=True, **more)
        cache = out[name]
        outputs.append(out.logits)
    return outputs


def keeps_packed_apart(kind: str) -> bool:
    """Whether the convolution of the installed transformers accepts packed sequences."""
    return not hasattr(modelling(kind), "chunk_gated_delta_rule")


def make_packed(device: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Five sequences, one of them empty: packed as by transformers' collator, and each alone."""
    bounds = [0, 3, 3, 40, 41, 70]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(SIZES["vocab_size"], (1, bounds[-1]), generator=generator).to(device)
    places = [torch.arange(b - a, device=device) for a, b in pairwise(bounds)]
    ends = torch.tensor(bounds, dtype=torch.int32, device=device)
    packed: dict[str, Any] = {"input_ids": ids, "position_ids": torch.cat(places)[None]}
    packed |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 37, "max_length_k": 37}
    return packed, [{"input_ids": ids[:, a:b]} for a, b in pairwise(bounds) if b > a]


def run_all(model: Any, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Logits of all tokens of the batches, and gradients of the mean of their squares."""
    model.zero_grad()
    logits = torch.cat([model(**inputs, use_cache=False).logits for inputs in batches], 1)
    logits.float().square().mean().backward()
    gradients = {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}
    return {"logits": logits.detach()} | gradients


def make_tokenizer() -> Any:
    """A tokenizer with the words w0, w1, ... for the tokens of the models."""
    tokenizers = importlib.import_module("tokenizers")
    words = {f"w{token}": token for token in range(SIZES["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return importlib.import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer
    )


def padded(device: str, T: int = 70) -> dict[str, torch.Tensor]:
    """Two sequences, the second shorter and padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(SIZES["vocab_size"], (2, T), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unpatched means transformers' own PyTorch; and no test leaves a patch behind."""
    make_plain(monkeypatch)
    yield
    importlib.import_module("gdn.integrations.transformers").unpatch()


@pytest.fixture(params=CLASSES)
def kind(request: pytest.FixtureRequest) -> str:
    """A model that the installed transformers has."""
    modelling(request.param)
    return request.param
