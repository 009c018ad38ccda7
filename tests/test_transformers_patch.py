"""`patch` and `unpatch`: what they put where, in which order patches end, and what they refuse."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import gdn
from gdn.testing import TOLERANCE, relative_error

pytest.importorskip("transformers", reason="transformers is not installed")
models = importlib.import_module("models")
integration = importlib.import_module("gdn.integrations.transformers")
make_model, modelling, padded = models.make_model, models.modelling, models.padded


kind, plain = models.kind, models.plain  # fixtures


def functions(model: Any, kind: str) -> list[object]:
    """Whatever `patch` puts functions into in this version."""
    holders = [modelling(kind), *(x for x in model.modules() if type(x).__module__.endswith(kind))]
    holders += {type(x) for x in holders[1:]}
    names: tuple[str, ...]
    names = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule", "causal_conv1d_fn", "forward")
    names += ("fused_recurrent_gated_delta_rule", *(f"torch_{name}" for name in names))
    return [vars(holder)[name] for holder in holders for name in names if name in vars(holder)]


def test_patching_is_idempotent_and_undone(kind: str) -> None:
    model = make_model(kind, "cpu")
    before = functions(model, kind)
    integration.patch(model)
    once = functions(model, kind)
    assert once != before
    integration.patch(model, backend="torch")
    assert functions(model, kind) == once
    with integration.patch(), integration.patch(model):
        pass
    assert functions(model, kind) == once
    integration.unpatch()
    assert functions(model, kind) == before
    integration.unpatch()
    with integration.patch(model), pytest.raises(ZeroDivisionError), integration.patch():
        raise ZeroDivisionError
    assert functions(model, kind) == before


def test_the_backend_is_the_one_asked_for_last(kind: str) -> None:
    model, inputs = make_model(kind, "cpu"), padded("cpu", 20)
    with integration.patch(model, backend="fla"):
        with pytest.raises(gdn.BackendUnsupportedError, match="fla"):
            model(**inputs)
        with integration.patch(model, backend="torch"):
            model(**inputs)
        with pytest.raises(gdn.BackendUnsupportedError, match="fla"):
            model(**inputs)
    model(**inputs)


def test_patches_end_in_any_order(kind: str) -> None:
    model = make_model(kind, "cpu")
    before, inputs = functions(model, kind), padded("cpu", 20)
    first, second = (integration.patch(model, backend=name) for name in ("torch", "fla"))
    with pytest.raises(gdn.BackendUnsupportedError, match="fla"):
        model(**inputs)
    first.__exit__(None, None, None)
    with pytest.raises(gdn.BackendUnsupportedError, match="fla"):  # still in force
        model(**inputs)
    third = integration.patch(model, backend="torch")
    second.__exit__(None, None, None)
    model(**inputs)
    third.__exit__(None, None, None)
    assert functions(model, kind) == before
    left = integration.patch(model)
    integration.unpatch()
    with left:
        pass
    assert functions(model, kind) == before


def test_wrong_arguments_of_patch_are_named(kind: str) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or None, got str"):
        integration.patch("torch")
    with pytest.raises(TypeError, match="backend must be a str, got int"):
        integration.patch(backend=5)
    with pytest.raises(gdn.UnknownBackendError, match="did you mean 'torch'"):
        integration.patch(backend="troch")


def test_models_made_while_patched_and_used_afterwards(kind: str) -> None:
    inputs = padded("cpu", 20)
    expected = make_model(kind, "cpu")(**inputs).logits
    with integration.patch(backend="torch"):
        model = make_model(kind, "cpu")
        patched = model(**inputs).logits
    assert not torch.equal(patched, expected)
    assert relative_error(patched, expected) <= TOLERANCE[torch.float32]
    assert torch.equal(model(**inputs).logits, expected)


def test_other_models_and_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"linear attention of Qwen3-Next, .*got Linear;"):
        integration.patch(nn.Linear(2, 2))
    module = modelling("qwen3_next")
    for name in ("torch_chunk_gated_delta_rule", "chunk_gated_delta_rule"):
        monkeypatch.delattr(module, name, raising=False)
    with pytest.raises(RuntimeError, match=r"a version that gdn knows, got \d.*in another way"):
        integration.patch()


def test_the_tests_cover_every_model_of_the_table() -> None:
    kimi = importlib.import_module("test_transformers_kimi")
    per_channel = {name for name, model in integration.MODELS.items() if model.per_channel}
    assert set(kimi.CLASSES) == per_channel
    assert set(models.CLASSES) == set(integration.MODELS) - per_channel


def test_subclasses_of_known_layers_are_patched(kind: str) -> None:
    model, inputs = make_model(kind, "cpu"), padded("cpu", 20)
    expected = model(**inputs).logits
    known = getattr(modelling(kind), integration.MODELS[kind].layer)
    own = type("Own", (known,), {"__module__": "elsewhere"})
    for layer in model.modules():
        if type(layer) is known:
            layer.__class__ = own
    with integration.patch(model, backend="torch"):
        got = model(**inputs).logits
        with integration.patch(model, backend="fla"), pytest.raises(gdn.BackendUnsupportedError):
            model(**inputs)
    assert not torch.equal(got, expected)
    assert relative_error(got, expected) <= TOLERANCE[torch.float32]


def test_unknown_layers_are_named(kind: str) -> None:
    strange = type("OtherDeltaNet", (nn.Linear,), {"__module__": "elsewhere"})
    alone = nn.Sequential(strange(2, 2))
    with pytest.raises(ValueError, match=r"got Sequential with elsewhere.OtherDeltaNet; other"):
        integration.patch(alone)
    both = nn.ModuleList([alone, make_model(kind, "cpu")])
    with pytest.warns(RuntimeWarning, match=r"leaves as they are, the layers elsewhere.OtherDelta"):
        integration.patch(both)
