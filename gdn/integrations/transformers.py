"""gdn as the engine of models of Hugging Face transformers, 4.57 or newer: the `MODELS`.

Their layers call one function for whole sequences and one for single tokens. Up to 5.14 a layer
takes both from its module when it is made, and keeps them as attributes; from then on it calls its
module's functions by name. `patch` puts gdn behind whichever it finds.

From 5.15 on the short convolution is among the module's functions, and patched too, so that packed
sequences, whose bounds are in `cu_seq_lens_q`, stay apart; before, patched layers refuse them. The
gated norm is a class, whose forward is patched. Both run on gdn's kernels where these can run. The
forward of layers with a decay per head is patched too, so that they pass raw gates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

from torch import nn

from gdn.dispatch import parse_request
from gdn.integrations.transformers_functions import run
from gdn.integrations.transformers_gates import (
    RULE,
    activate_arguments,
    run_layer,
    with_raw_gates,
)
from gdn.integrations.transformers_models import MODELS, find_layers, import_models, version
from gdn.integrations.transformers_packed import find_layer_class, find_norm_class, run_forward
from gdn.integrations.transformers_parts import run_convolution, run_convolution_step, run_norm

_PREFILL, _STEP = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule")
_FORWARD = "forward"
_CONVOLUTION_STEP = "causal_conv1d_update"
Role = str | Callable[..., Any]
"""What takes the place of a function: the delta rule of `_PREFILL` or `_STEP`, or what is called
with the function and its arguments."""
_PER_HEAD: dict[str, Role]
_PER_HEAD = {RULE[0]: _PREFILL, RULE[1]: _STEP, "causal_conv1d_fn": run_convolution}
_PER_CHANNEL: dict[str, Role]
_PER_CHANNEL = {
    "chunk_kimi_delta_attention": _PREFILL,
    "recurrent_kimi_delta_attention": _STEP,
    "causal_conv1d_fn": run_convolution,
}
_FOR_NEW_LAYERS: dict[str, Role]
_FOR_NEW_LAYERS = {
    "chunk_gated_delta_rule": _PREFILL,
    "fused_recurrent_gated_delta_rule": _STEP,
}
_installed: list[_Patch] = []

__all__ = ["MODELS", "Patched", "patch", "unpatch"]


@dataclass(eq=False)
class _Patch:
    """One patched name: the layer, class or module that holds it, what it held before, and the
    backend of each `patch` that has not ended, the latest one last.

    A layer made while the patch is on keeps the replacement. That calls `original` once the patch
    is off.
    """

    owner: nn.Module | type | ModuleType
    name: str
    before: object
    original: Callable[..., Any]
    role: Role
    backends: dict[Patched, str | None] = field(default_factory=dict)
    replacement: Callable[..., Any] | None = None

    @property
    def on(self) -> bool:
        """Whether a `patch` of this name is on."""
        return len(self.backends) > 0  # Dynamo of torch 2.11 does not trace bool of a dict

    def make_replacement(self) -> Callable[..., Any]:
        """The function that takes the name: gdn's while the patch is on, else the original."""

        @functools.wraps(self.original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on:  # perhaps since the layer that calls began
                return self.original(*activate_arguments(args, kwargs), **kwargs)
            if not isinstance(self.role, str):
                return self.role(self.original, *args, **kwargs)
            return run(self.role == _STEP, [*self.backends.values()][-1], *args, **kwargs)

        call.gdn_patch = self  # type: ignore[attr-defined]
        self.replacement = call
        return call


class Patched:
    """What `patch` returns: a context manager that takes back its patch at its end. Patches may end
    in any order. The latest patch that has not ended names the backend."""

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for entry in list(_installed):
            entry.backends.pop(self, None)
            if not entry.on:
                _restore(entry)


def patch(model: nn.Module | None = None, backend: str | None = None) -> Patched:
    """Let gdn compute the gated delta rule in the `MODELS`, dense and mixture of experts, and where
    kernels are installed their short convolution and gated norm.

    Args:
        model: a model, whose layers are patched, those of subclasses too; None patches transformers
            itself, for models made from now on. From transformers 5.15 on, functions belong to a
            model's module, and both forms patch every model of that kind in the process, made
            before or after.
        backend: as in `gdn.gated_delta_net`.

    Returns:
        A context manager, for `with patch(): ...`; without `with`, the patch stays until `unpatch`.
        Patching again changes the backend and nothing else.

    Warns:
        RuntimeWarning: beside known layers the model has others that look like them.

    Raises:
        TypeError: model is not a module, or backend not a str.
        ValueError: the model has no such layer (the message names those that look like one), or no
            backend has the name.
        RuntimeError: transformers is missing, older than 4.57, or has changed in a way unknown
            here.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module or None, got {type(model).__name__}; "
            "name a backend as backend='triton'"
        )
    if backend is not None:
        parse_request(backend)
    patched = Patched()
    for owner, name, original, role in _find(model):
        holder = getattr(owner, name)
        entry = getattr(holder, "gdn_patch", None)
        if entry is None or entry.owner is not owner:
            entry = _Patch(owner, name, holder, original, role)
            setattr(owner, name, entry.make_replacement())
        if entry not in _installed:  # new, or somebody has put it back after its end
            _installed.append(entry)
        entry.backends[patched] = backend
    return patched


def unpatch() -> None:
    """Undo every `patch`, of transformers and of models."""
    for entry in list(_installed):
        entry.backends.clear()
        _restore(entry)


def _restore(entry: _Patch) -> None:
    if getattr(entry.owner, entry.name) is entry.replacement:  # else somebody has wrapped it
        setattr(entry.owner, entry.name, entry.before)
    _installed.remove(entry)


Target = tuple[nn.Module | type | ModuleType, str, Callable[..., Any], Role]


def _find(model: nn.Module | None) -> Iterator[Target]:
    """Where the functions are: owner, name, what to call unpatched, and the function's role."""
    modules = import_models()
    layers = [] if model is None else find_layers(model, modules)
    for kind in sorted({kind for kind, _ in layers} or set(modules)):
        module = modules[kind]
        norm = find_norm_class(module)
        if norm is not None:
            yield norm, _FORWARD, norm.forward, run_norm
        if all(hasattr(module, function) for function in _FOR_NEW_LAYERS):
            owner = find_layer_class(module)
            yield owner, _FORWARD, getattr(owner, _FORWARD), run_forward
            for function, role in _FOR_NEW_LAYERS.items() if model is None else ():
                original = getattr(module, function) or getattr(module, f"torch_{role}")
                yield module, function, original, role
            continue
        functions = _PER_CHANNEL if MODELS[kind].per_channel else _PER_HEAD
        if not all(hasattr(module, function) for function in functions):
            raise RuntimeError(
                f"transformers must be of a version that gdn knows, got {version()}, whose "
                f"{module.__name__} calls the gated delta rule in another way; please report it"
            )
        if hasattr(module, _CONVOLUTION_STEP):
            functions = functions | {_CONVOLUTION_STEP: run_convolution_step}
        for function, role in functions.items():
            yield module, function, getattr(module, function), role
        layer_class = getattr(module, MODELS[kind].layer)
        raw = with_raw_gates(layer_class.forward)
        if raw is not None:
            around = functools.partial(run_layer, module, raw)
            yield layer_class, _FORWARD, layer_class.forward, around
    for _, layer in layers:
        if hasattr(layer, _PREFILL) and hasattr(layer, _STEP):
            for name in (_PREFILL, _STEP):
                yield layer, name, getattr(layer, name), name
