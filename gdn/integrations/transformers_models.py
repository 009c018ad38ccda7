"""The models of transformers that gdn knows: the one table of them, their modules and layers."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import NamedTuple

from torch import nn


class Model(NamedTuple):
    """A model of transformers.

    Fields: its name, the class of its linear attention layer, whether its decay is per channel, and
    the oldest transformers that it was tried with.
    """

    title: str
    layer: str
    per_channel: bool
    tried_from: str


MODELS = {
    "qwen3_next": Model("Qwen3-Next", "Qwen3NextGatedDeltaNet", False, "4.57"),
    "qwen3_5": Model("Qwen3.5", "Qwen3_5GatedDeltaNet", False, "5.2"),
    "qwen3_5_moe": Model("Qwen3.5 MoE", "Qwen3_5MoeGatedDeltaNet", False, "5.2"),
    "qwen4_exp": Model("Qwen4-Exp", "Qwen4ExpTextGatedDeltaNet", False, "5.24"),
    "olmo_hybrid": Model("OLMo Hybrid", "OlmoHybridGatedDeltaNet", False, "5.24"),
    "lara_mini": Model("Lara Mini", "LaraMiniGatedDeltaNet", False, "5.24"),
    "kimi_linear": Model("Kimi Linear", "KimiLinearDeltaAttention", True, "5.24"),
    "bailing_hybrid": Model("Ling 3", "BailingHybridDeltaAttention", True, "5.24"),
    "glm5_next": Model("GLM-5-Next", "Glm5NextTextLinearAttention", True, "5.24"),
}
"""By the name of their folder in transformers.models. `patch`, the tests and docs/frameworks.md
read this table."""


def import_models() -> dict[str, ModuleType]:
    """The modelling modules of the `MODELS` that the installed transformers has, by name."""
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError(
            'transformers must be installed, got none; pip install "gdn[transformers]"'
        )
    found = {}
    for model in MODELS:
        name = f"transformers.models.{model}.modeling_{model}"
        try:
            found[model] = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    if not found:
        raise RuntimeError(
            f"transformers must be 4.57 or newer, got {version()} without Qwen3-Next; upgrade it"
        )
    return found


def version() -> str:
    """That of the installed transformers."""
    return str(importlib.import_module("transformers").__version__)


def find_layers(model: nn.Module, modules: dict[str, ModuleType]) -> list[tuple[str, nn.Module]]:
    """The model's layers of a known class or a subclass of one, each with the name of the class's
    model. ValueError without any; a warning if there are others that look like them."""
    classes = {name: getattr(module, MODELS[name].layer) for name, module in modules.items()}
    found, unknown = [], set()
    for layer in model.modules():
        kind = type(layer)
        names = [name for name, known in classes.items() if isinstance(layer, known)]
        found += [(name, layer) for name in names]
        if not names and "Delta" in kind.__name__ and not kind.__module__.startswith("gdn."):
            unknown.add(f"{kind.__module__}.{kind.__qualname__}")
    strange = f" with {', '.join(sorted(unknown))}" if unknown else ""
    if not found:
        raise ValueError(
            "model must contain layers of the linear attention of "
            f"{', '.join(known.title for known in MODELS.values())} or subclasses of them, got "
            f"{type(model).__name__}{strange}; other layers can call gdn.gated_delta_net "
            "themselves, and those that call fla get gdn by import gdn.integrations.fla"
        )
    if unknown:
        warnings.warn(
            f"gdn does not know, and leaves as they are, the layers {', '.join(sorted(unknown))}",
            RuntimeWarning,
            stacklevel=4,
        )
    return found
