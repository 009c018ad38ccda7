"""gdn under flash-linear-attention 0.6: importing this module registers gdn in fla's registry, so
that everything which calls fla's gated delta rule or Kimi Delta Attention gets gdn.

`chunk_gated_delta_rule`, `chunk_kda` and `fused_recurrent_kda` ask that registry at each call.
`fused_recurrent_gated_delta_rule` does not; the function below it is replaced while gdn is
registered. FLA_GDN=0 turns gdn off, like the variables of fla's other backends.

gdn declines, and fla goes on as without it: calls with an argument that gdn does not know,
calls that gdn's own fla backend makes, and on a GPU, unless a backend is asked for, calls that none
of gdn's own kernels can run. fla logs the reason at level INFO.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn import calls, dispatch, registry
from gdn.api import gated_delta_net
from gdn.distributed import choice
from gdn.integrations.fla_arguments import Arguments, Entry, describe_entry, read
from gdn.integrations.recurrence import run_step, state_shape
from gdn.reentry import is_calling_out


def _import_fla() -> Any:
    """fla.backends. RuntimeError where it is missing or has another registry."""
    if importlib.util.find_spec("fla") is None:
        raise RuntimeError('fla-core 0.6 must be installed, got none; pip install "gdn[fla]"')
    try:
        module = importlib.import_module("fla.backends")
    except ModuleNotFoundError:
        found = getattr(importlib.import_module("fla"), "__version__", "another version")
        raise RuntimeError(
            f'fla-core must be 0.6, got {found} without fla.backends; pip install "gdn[fla]"'
        ) from None
    if module._DISPATCH_DISABLED:
        raise RuntimeError(
            "fla's registry must be in use, got FLA_DISABLE_BACKEND_DISPATCH=1; unset it"
        )
    return module


_backends = _import_fla()
_chunk = importlib.import_module("fla.ops.gated_delta_rule.chunk")
_recurrent = importlib.import_module("fla.ops.gated_delta_rule.fused_recurrent")
_kda = importlib.import_module("fla.ops.kda.chunk")
_kda_recurrent = importlib.import_module("fla.ops.kda.fused_recurrent")

_RECURRENT = "fused_recurrent_gated_delta_rule_fwd"
_ENTRIES = {
    "chunk_gated_delta_rule": describe_entry(_chunk.chunk_gated_delta_rule, False, False),
    "chunk_kda": describe_entry(_kda.chunk_kda, True, False),
    "fused_recurrent_kda_fwd": describe_entry(_kda_recurrent.fused_recurrent_kda_fwd, True, True),
    _RECURRENT: describe_entry(getattr(_recurrent, _RECURRENT), False, True),
}


class _InForce(NamedTuple):
    """What is registered: a request as in `gdn.gated_delta_net`."""

    backend: str | None


_registered: _InForce | None = None


def _request(x: Tensor) -> tuple[str, bool]:
    """The request of a call with this tensor, and whether it must run."""
    return dispatch.framework_request(x.device, _registered.backend if _registered else None)


def _check(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise, with the reason, if fla must go on by itself. Choices are remembered, refusals too."""
    if is_calling_out():
        raise ValueError("gdn's fla backend made the call")
    found = read(entry, args, kwargs)
    request, must_run = _request(found.tokens["q"])
    if must_run:
        return
    given = (*found.tokens.values(), *found.options.values(), found.initial_state)
    tensors = [x for x in given if isinstance(x, Tensor)]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    key = (
        registry.generation, request, entry, needs_grad, found.output_final_state,
        found.cp is not None, *found.options,
        *[(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in given],
    )  # fmt: skip
    if key not in _refusals:
        if len(_refusals) >= _LIMIT:
            _refusals.clear()
        _refusals[key] = _refusal(request, entry, found, needs_grad)
    if _refusals[key]:
        raise ValueError(_refusals[key])


_refusals: dict[tuple[object, ...], str] = {}
_LIMIT = 4096


def _refusal(request: str, entry: Entry, found: Arguments, needs_grad: bool) -> str:
    """Why no backend of the request can run the call; empty if one can."""
    tokens, options, initial_state, output_final_state, cp = found
    try:
        with _without_autocast(tokens["q"]):
            if entry.step:
                state = tokens["q"].new_empty(state_shape(tokens, options), dtype=torch.float32)
                step: Any = calls.make(**tokens, options=options | {"state": state}, prefill=False)
                dispatch.choose_for_pool(request, step)
            elif cp is not None:
                # as if packed on every rank: all ranks must decide alike, or they wait in vain
                packed = options | {"cu_seqlens": tokens["q"].new_zeros(2, dtype=torch.int64)}
                part: Any = calls.make(**tokens, options=packed, prefill=False)
                choice.pin(request, part, needs_grad)
            else:
                states = {"initial_state": initial_state, "output_final_state": output_final_state}
                call: Any = calls.make(**tokens, options=options | states, prefill=False)
                dispatch.choose(request, call, needs_grad)
    except Exception as error:  # the fault of an argument, too, which fla may name in its own way
        return str(error)
    return ""


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """fla computes in the dtypes of its arguments, whether autocast is on or not."""
    if calls.autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _run(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call that `_check` let pass: fla's (o, final_state)."""
    tokens, options, initial_state, output_final_state, cp = read(entry, args, kwargs)
    request, _ = _request(tokens["q"])
    with _without_autocast(tokens["q"]):
        if entry.step:
            return run_step(request, tokens, options, initial_state, output_final_state)
        o, final_state = gated_delta_net(
            **tokens, **options, initial_state=initial_state,
            output_final_state=output_final_state, cp=cp, backend=request,
        )  # fmt: skip
    return o.to(tokens["q"].dtype), final_state


class _Gdn(_backends.BaseBackend):  # type: ignore[misc, name-defined]
    """gdn as one of fla's backends, before all others."""

    backend_type = "gdn"
    env_var = "FLA_GDN"
    priority = -1

    def is_enabled(self) -> bool:
        return _registered is not None and bool(super().is_enabled())

    def verify(self, function_name: str, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        entry = _ENTRIES.get(function_name)
        if entry is None:  # a part of a call
            return True, None
        try:
            _check(entry, args, kwargs)
        except Exception as error:
            return False, str(error)
        return True, None

    def get_implementation(self, function_name: str) -> Callable[..., Any] | None:
        entry = _ENTRIES.get(function_name)
        return None if entry is None else lambda *args, **kwargs: _run(entry, args, kwargs)


for _entry_point in ("gated_delta_rule", "kda", _kda.chunk_kda):
    _backends.register(_entry_point)(_Gdn)
_original = getattr(_recurrent, _RECURRENT)
_registry = _backends.BackendRegistry(_recurrent.__name__)
_registry.register(_Gdn())
_replacement = _registry.dispatch(_original)


def _put(registered: _InForce | None) -> None:
    """Make this what is registered; None is fla alone."""
    global _registered
    _registered = registered
    setattr(_recurrent, _RECURRENT, _original if registered is None else _replacement)


class Registration:
    """What `register` and `unregister` return: a context manager that restores, at its end, what
    was registered before it."""

    def __init__(self, before: _InForce | None) -> None:
        self._before = before

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        _put(self._before)


def register(backend: str | None = None) -> Registration:
    """Let gdn answer fla's calls from now on, in the whole process.

    Args:
        backend: as in `gdn.gated_delta_net`. With a name or a list, a call that they cannot run
            raises BackendUnsupportedError. None follows `gdn.use_backend`,
            `gdn.set_default_backend` and GDN_BACKEND, else "auto".

    Returns:
        A context manager, for `with register("triton"): ...`; its end restores what was registered
        before, that of the import too. Without `with`, gdn stays until `unregister`.

    Raises:
        TypeError: backend is not a str.
        UnknownBackendError: no backend has the name (a ValueError).
    """
    if backend is not None:
        dispatch.parse_request(backend)
    registration = Registration(_registered)
    _put(_InForce(backend))
    return registration


def unregister() -> Registration:
    """Let fla answer its calls by itself again, until `register`; as a context manager, until its
    end."""
    registration = Registration(_registered)
    _put(None)
    return registration


register()
