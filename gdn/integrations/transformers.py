"""gdn as the engine of Qwen3-Next, Qwen3.5, Kimi Linear, Ling 3 (bailing_hybrid) and GLM-5-Next in
Hugging Face transformers, 4.57 or newer.

Their layers call one function for whole sequences and one for single tokens. Up to 5.14 a layer
takes both from its module when it is made, and keeps them as attributes; from then on it calls its
module's functions by name. `patch` puts gdn behind whichever it finds.

Packed sequences, whose bounds are in `cu_seq_lens_q`, also need a short convolution that keeps them
apart. From 5.15 on it is one of the module's functions, and patched too; before, patched layers
refuse packed sequences.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gdn.api import gated_delta_net
from gdn.dispatch import parse_request
from gdn.integrations.transformers_packed import (
    check_state,
    find_layer_class,
    run_convolution,
    run_forward,
)
from gdn.serving import gated_delta_net_decode

MODELS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "kimi_linear", "bailing_hybrid", "glm5_next")
"""Models of transformers whose linear attention is a gated delta net, the last three with a decay
per channel."""

_PREFILL, _STEP = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule")
_CONVOLUTION, _FORWARD = ("causal_conv1d_fn", "forward")
_ON_MODULES = {
    "torch_chunk_gated_delta_rule": _PREFILL,
    "torch_recurrent_gated_delta_rule": _STEP,
    "causal_conv1d_fn": _CONVOLUTION,
}
_ON_KIMI_MODULES = {
    "chunk_kimi_delta_attention": _PREFILL,
    "recurrent_kimi_delta_attention": _STEP,
    "causal_conv1d_fn": _CONVOLUTION,
}
_LAYERS = ("GatedDeltaNet", "DeltaAttention", "Glm5NextTextLinearAttention")
_FOR_NEW_LAYERS = {
    "chunk_gated_delta_rule": _PREFILL,
    "fused_recurrent_gated_delta_rule": _STEP,
}
_AROUND: dict[str, Callable[..., Any]]
_AROUND = {_CONVOLUTION: run_convolution, _FORWARD: run_forward}
_installed: list[_Patch] = []


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
    role: str
    backends: dict[Patched, str | None] = field(default_factory=dict)

    @property
    def on(self) -> bool:
        """Whether a `patch` of this name is on."""
        return bool(self.backends)

    def make_replacement(self) -> Callable[..., Any]:
        """The function that takes the name: gdn's while the patch is on, else the original."""

        @functools.wraps(self.original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return self.original(*args, **kwargs)
            if self.role in _AROUND:
                return _AROUND[self.role](self.original, *args, **kwargs)
            if "cu_seqlens" not in kwargs:  # Kimi's layers pass on what they were given
                kwargs["cu_seqlens"] = kwargs.get("cu_seq_lens_q")
            check_state(**kwargs)
            run = _run_prefill if self.role == _PREFILL else _run_step
            return run([*self.backends.values()][-1], *args, **kwargs)

        call.gdn_patch = self  # type: ignore[attr-defined]
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
    """Let gdn compute the gated delta rule in the `MODELS`, dense and mixture of experts.

    Args:
        model: a model, whose layers are patched; None patches transformers itself, for models made
            from now on. From transformers 5.15 on, functions belong to a model's module, and both
            forms patch every model of that kind in the process, made before or after.
        backend: as in `gdn.gated_delta_net`.

    Returns:
        A context manager, for `with patch(): ...`; without `with`, the patch stays until `unpatch`.
        Patching again changes the backend and nothing else.

    Raises:
        TypeError: model is not a module, or backend not a str.
        ValueError: the model has no such layer, or no backend has the name.
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
            _installed.append(entry)
        entry.backends[patched] = backend
    return patched


def unpatch() -> None:
    """Undo every `patch`, of transformers and of models."""
    for entry in list(_installed):
        entry.backends.clear()
        _restore(entry)


def _restore(entry: _Patch) -> None:
    setattr(entry.owner, entry.name, entry.before)
    _installed.remove(entry)


def _modules() -> dict[str, ModuleType]:
    """The modelling modules that this transformers has, by name."""
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError(
            'transformers must be installed, got none; pip install "gdn[transformers]"'
        )
    found = {}
    for model in MODELS:
        name = f"transformers.models.{model}.modeling_{model}"
        try:
            found[name] = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    if not found:
        raise RuntimeError(
            f"transformers must be 4.57 or newer, got {_version()} without Qwen3-Next; upgrade it"
        )
    return found


def _version() -> str:
    return str(importlib.import_module("transformers").__version__)


Target = tuple[nn.Module | type | ModuleType, str, Callable[..., Any], str]


def _find(model: nn.Module | None) -> Iterator[Target]:
    """Where the functions are: owner, name, what to call unpatched, and the function's role."""
    modules = _modules()
    layers = [
        layer
        for layer in (() if model is None else model.modules())
        if type(layer).__module__ in modules and type(layer).__name__.endswith(_LAYERS)
    ]
    if model is not None and not layers:
        raise ValueError(
            "model must contain layers of Qwen3-Next or Qwen3.5 linear attention, or of Kimi's, "
            f"got {type(model).__name__}; other models can call gdn.gated_delta_net themselves"
        )
    used = {type(layer).__module__ for layer in layers} or set(modules)
    for name in sorted(used):
        module = modules[name]
        if all(hasattr(module, function) for function in _FOR_NEW_LAYERS):
            owner = find_layer_class(module)
            yield owner, _FORWARD, getattr(owner, _FORWARD), _FORWARD
            for function, role in _FOR_NEW_LAYERS.items() if model is None else ():
                original = getattr(module, function) or getattr(module, f"torch_{role}")
                yield module, function, original, role
            continue
        for functions in (_ON_MODULES, _ON_KIMI_MODULES):
            if all(hasattr(module, function) for function in functions):
                for function, role in functions.items():
                    yield module, function, getattr(module, function), role
                break
        else:
            raise RuntimeError(
                f"transformers must be of a version that gdn knows, got {_version()}, whose "
                f"{name} calls the gated delta rule in another way; please report it"
            )
    for layer in layers:
        if hasattr(layer, _PREFILL) and hasattr(layer, _STEP):
            for role in (_PREFILL, _STEP):
                yield layer, role, getattr(layer, role), role


_OPTIONS = ("scale", "use_qk_l2norm_in_kernel", "cu_seqlens")


def _run_prefill(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *_: object,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' function for sequences, with its arguments; those that it does not know either
    are dropped."""
    options = {name: kwargs[name] for name in _OPTIONS if kwargs.get(name) is not None}
    return gated_delta_net(
        query, key, value, g, beta, initial_state=initial_state,
        output_final_state=output_final_state, backend=backend, **options,
    )  # fmt: skip


def _run_step(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *_: object,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same for a few tokens: a decode step on a copy of the state, so that the caller's stays
    as it is; or, where gradients are wanted, a short sequence."""
    tensors = (query, key, value, g, beta)
    given = tensors if initial_state is None else (*tensors, initial_state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return _run_prefill(
            backend, *tensors, initial_state=initial_state,
            output_final_state=output_final_state, **kwargs,
        )  # fmt: skip
    options = {name: kwargs[name] for name in _OPTIONS if kwargs.get(name) is not None}
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    if initial_state is None:
        N = query.shape[0] if "cu_seqlens" not in options else len(options["cu_seqlens"]) - 1
        state = query.new_zeros((N, value.shape[2], key.shape[3], value.shape[3]), dtype=exact)
    else:
        state = initial_state.to(exact, copy=True, memory_format=torch.contiguous_format)
    o = gated_delta_net_decode(*tensors, state=state, backend=backend, **options)
    return o, state if output_final_state else None
