"""gdn as a local repository of the kernels library: what it holds, and that the library, and
transformers by a KernelConfig, pick gdn from it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gdn
from gdn.testing import TOLERANCE, Case, make_inputs, relative_error

pytest.importorskip("transformers", reason="transformers is not installed")
models = importlib.import_module("models")
kimi = importlib.import_module("test_transformers_kimi")
integration = importlib.import_module("gdn.integrations.kernels")
MODELS = importlib.import_module("gdn.integrations.transformers").MODELS


def function_names(kind: str) -> tuple[str, str]:
    """The functions of a model's module that take sequences and single tokens."""
    if MODELS[kind].per_channel:
        return kimi.FUNCTIONS
    return "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"


def test_the_repository_is_a_package_of_another_name(tmp_path: Path) -> None:
    folder = integration.write_repository(tmp_path / "kernels")
    assert integration.write_repository(folder) == folder  # again
    variant = folder / "build" / "torch-universal"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"] != "gdn"
    spec = importlib.util.spec_from_file_location(metadata["id"], variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.layers.Sequences is integration.Sequences


@pytest.mark.parametrize("kind", MODELS)
def test_layers_have_the_signatures_of_transformers_functions(kind: str) -> None:
    """The library compares numbers and kinds of parameters; gdn needs the names too."""
    module = models.modelling(kind)
    if not hasattr(module, "use_kernel_func_from_hub_with_fallback"):
        pytest.skip("functions of this transformers are not for the kernels library")
    for layer, name in zip(("Sequences", "Tokens"), function_names(kind), strict=True):
        function = getattr(module, name)
        expected = inspect.signature(
            function.forward if isinstance(function, nn.Module) else function
        )
        found = list(inspect.signature(getattr(integration, layer).forward).parameters.values())[1:]
        assert [(p.name, p.kind) for p in found] == [
            (p.name, p.kind) for p in expected.parameters.values()
        ]


@pytest.mark.parametrize("kind", ["qwen3_next", "kimi_linear"])
def test_the_configuration_names_a_models_functions(kind: str, tmp_path: Path) -> None:
    module = models.modelling(kind)
    if not hasattr(module, "use_kernel_func_from_hub_with_fallback"):
        with pytest.raises(RuntimeError, match=f"must have {kind} with functions that kernels may"):
            integration.kernel_config(kind, tmp_path)
        return
    config = integration.kernel_config(kind, tmp_path)
    source = inspect.getsource(module)
    for name, place in config.kernel_mapping.items():
        assert f'use_kernel_func_from_hub_with_fallback("{name}"' in source
        assert place.startswith(f"{tmp_path}:")
        assert hasattr(integration, place.rpartition(":")[2])
    assert config.use_local_kernel
    with pytest.raises(ValueError, match=r"model must be one of qwen3_next, .* got 'qwen'"):
        integration.kernel_config("qwen", tmp_path)


def make_original(name: str) -> Any:
    """A function with the signature of transformers', for the library to replace."""

    def original(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    layer = inspect.signature(getattr(integration, name.title()).forward)
    parameters = list(layer.parameters.values())[1:]
    original.__signature__ = layer.replace(parameters=parameters)  # type: ignore[attr-defined]
    return original


def test_the_library_replaces_functions_by_gdn(tmp_path: Path) -> None:
    """On a CPU, with functions of its own in the place of transformers'."""
    kernels = pytest.importorskip("kernels", reason="kernels is not installed")
    folder = integration.write_repository(tmp_path)
    functions = {
        name: kernels.use_kernel_forward_from_hub(name)(make_original(name))
        for name in ("sequences", "tokens")
    }

    @kernels.use_kernelized_func(*functions.values())
    class Layer(nn.Module):
        def forward(self, name: str, *tokens: Any, **options: Any) -> Any:
            return functions[name](*tokens, **options)

    layer = Layer().eval()
    inputs = make_inputs(Case("kernels", T=9, HV=4))
    tokens = [inputs.pop(name) for name in ("q", "k", "v", "g", "beta")]
    del inputs["state_v_first"]
    with pytest.raises(NotImplementedError):
        layer("tokens", *tokens, **inputs)
    before = gdn.gated_delta_net(*tokens, **inputs)
    mapping: dict[str, Any] = {}
    for name in functions:
        place = kernels.LocalLayerRepository(repo_path=folder, layer_name=name.title())
        mapping[name] = {"cpu": {kernels.Mode.INFERENCE: place}}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(layer, mode=kernels.Mode.INFERENCE, device="cpu")
    for name in functions:
        got = layer(name, *tokens, **inputs)
        for one, other in zip(got, before, strict=True):
            assert relative_error(one, other) <= TOLERANCE[torch.float32]
        with gdn.use_backend("fla"), pytest.raises(gdn.BackendUnsupportedError, match="fla"):
            layer(name, *tokens, **inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3_next", "olmo_hybrid"])
def test_a_kernel_config_picks_gdn(kind: str, tmp_path: Path) -> None:
    """In transformers, which takes local repositories for models on a GPU."""
    utilities = importlib.import_module("transformers.utils.import_utils")
    if not utilities.is_kernels_available():
        pytest.skip(f"transformers needs kernels {utilities.KERNELS_MIN_VERSION} or newer")
    model, inputs = models.make_model(kind, "cuda"), models.padded("cuda")
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_use_kernels(True, integration.kernel_config(kind, tmp_path))
        got = model(**inputs).logits
        with gdn.use_backend("tilelang"), pytest.raises(gdn.BackendUnsupportedError):
            model(**inputs)  # gdn is asked
    assert relative_error(got, expected) <= TOLERANCE[torch.bfloat16]
