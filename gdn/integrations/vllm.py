"""gdn as the engine of vLLM's Gated DeltaNet layers: a general plugin of vLLM 0.33.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. From then
on vLLM's own registry makes gdn's subclasses where a model asks for its linear attention layers.
They keep vLLM's parameters, projections, convolution and caches, and run gdn on the layer's pool of
states. Where gdn refuses, the layer is vLLM's own, and one line of the log says why.

Environment: GDN_VLLM=prefill leaves decode to vLLM and replaces the chunked prefill function alone;
GDN_VLLM=0 turns gdn off. GDN_BACKEND names gdn's backend, as everywhere.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

logger = logging.getLogger("vllm.gdn")  # below vLLM's logger, so that its handlers print it

VERSIONS = ("0.33.",)
"""What the versions that gdn knows begin with. 0.33.0 was read."""
LAYERS = {
    "qwen_gdn_linear_attn": "QwenGatedDeltaNetAttention",
    "olmo_gdn_linear_attn": "OlmoHybridGatedDeltaNetAttention",
    "kimi_gdn_linear_attn": "KimiGatedDeltaNetAttention",
}
"""vLLM's layers that gdn serves, by their modules in vllm.model_executor.layers.mamba.gdn."""
PREFILL = {"qwen_gdn_linear_attn": "ChunkGatedDeltaRule"}
"""vLLM's function for chunked prefill, likewise."""
_FOLDER = "vllm.model_executor.layers.mamba.gdn."
_SETTINGS = {"layers": LAYERS, "prefill": PREFILL, "0": {}}

_said: set[str] = set()


def say(message: str) -> None:
    """Log a line once in this process."""
    message = " ".join(message.split())
    if message not in _said:
        _said.add(message)
        logger.info(message)


def register() -> None:
    """Put gdn into vLLM's registry, or say why not. No layer of vLLM is imported for it: each
    class is made when vLLM imports its module, since that import asks for the GPU. Calling it again
    changes nothing."""
    setting = os.environ.get("GDN_VLLM") or "layers"
    if setting not in _SETTINGS:
        say(f"gdn leaves vLLM as it is: GDN_VLLM must be layers, prefill or 0, got {setting!r}")
    elif setting == "0":
        say("gdn leaves vLLM as it is: GDN_VLLM=0")
    elif reason := refusal():
        say(f"gdn leaves vLLM as it is: {reason}")
    else:
        replace(_SETTINGS[setting])


def refusal() -> str | None:
    """Why gdn does not serve this vLLM at all."""
    version = getattr(importlib.import_module("vllm"), "__version__", "one without a version")
    if not version.startswith(VERSIONS):
        return f"vLLM must be {' or '.join(f'{x}x' for x in VERSIONS)}, got {version}"
    platform = importlib.import_module("vllm.platforms").current_platform
    if not platform.is_cuda():
        return f"the platform must be CUDA, got {type(platform).__name__}"
    return None


def replace(classes: dict[str, str]) -> None:
    """Replace these classes of vLLM, by their modules, as soon as the modules are imported."""
    for module, name in classes.items():
        full = _FOLDER + module
        if full in sys.modules:
            _register(sys.modules[full], name)
            continue
        watches = [x for x in sys.meta_path if isinstance(x, _Watch) and x.module == full]
        if not watches:
            watches = [_Watch(full)]
            sys.meta_path.insert(0, watches[0])
        watches[0].classes.add(name)


def _register(module: ModuleType, name: str) -> None:
    """Register gdn's subclass of a class that vLLM has just imported."""
    try:
        known = getattr(module, name)
        registry = importlib.import_module("vllm.model_executor.custom_op").op_registry_oot
        if name in registry:
            if not registry[name].__module__.startswith("gdn."):
                say(f"gdn leaves {name} to vLLM: {registry[name]!r} replaces it already")
            return
        made = importlib.import_module("gdn.integrations.vllm_layers").MAKERS[name](module)
        known.register_oot(name=name)(made)
    except Exception as error:  # vLLM must start without gdn
        say(f"gdn leaves {name} to vLLM: {type(error).__name__}: {error}")


class _Watch:
    """A finder that finds one module as ever, and registers classes after it has run."""

    def __init__(self, module: str) -> None:
        self.module, self.classes = module, set[str]()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            run(module)
            for name in sorted(self.classes):
                _register(module, name)

        loader.exec_module = exec_module
        return spec
