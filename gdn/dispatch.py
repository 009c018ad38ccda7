"""Which backend runs a call: the request in force, the reasons against backends, and the choice.

Precedence: backend= argument > use_backend context > set_default_backend > GDN_BACKEND (read at
    call time) > auto. One name is strict; a list ("tilelang,triton") and "auto" fall through in
    order.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn import registry
from gdn.aligned import make_plan
from gdn.backend import Backend, Plan, reasons_against
from gdn.checked import CheckedPlan
from gdn.environment import Variable
from gdn.exchange import call_of_a_rank
from gdn.problem import (
    CALL_TENSORS,
    POOL_TENSORS,
    Call,
    PoolCall,
    Problem,
    describe,
    describe_pool_call,
)
from gdn.registry import UnknownBackendError, backend_names, find_backend
from gdn.validation import validate, validate_pool_call

_default: str | None = None
_context: ContextVar[str | None] = ContextVar("gdn_backend", default=None)
_chosen: dict[tuple[object, ...], Chosen] = {}
_CHOSEN_LIMIT = 4096
_variable = Variable("GDN_BACKEND")
OWN_KERNELS = "auto-kernels"
"""The request for gdn's own kernels (`framework_request`). No backend can have this name."""


class BackendUnsupportedError(RuntimeError):
    """No requested backend can run the call. `reasons` maps each one's name to its reasons."""

    def __init__(self, request: str, problem: Problem, reasons: dict[str, list[str]]) -> None:
        self.request, self.problem, self.reasons = request, problem, reasons
        lines = [f"  {name}: {'; '.join(why)}" for name, why in reasons.items()]
        shown = "auto" if request == OWN_KERNELS else request
        super().__init__(f"no backend in {shown!r} can run {problem}\n" + "\n".join(lines))


class Chosen(NamedTuple):
    """The plan of calls that share a key, and the pinned request (`registry.pin`) of its
    backend."""

    plan: Plan
    pinned: str


def parse_request(request: str, argument: str = "backend") -> list[str]:
    """The names in a request, in order. A request is one name, a comma-separated list, or "auto".
    (Of pinned requests only those of other processes come here.)"""
    _check_request(request, argument)
    names: list[str] = []
    try:
        for part in (part.strip() for part in request.split(",")):
            if part in ("auto", OWN_KERNELS):
                names += _automatic_names(own=part == OWN_KERNELS)
            elif part:
                names.append(find_backend(part).name)
        if not names:
            raise UnknownBackendError(
                f"backend must name at least one backend, got {request!r}; try 'auto'"
            )
    except UnknownBackendError as error:
        if request == _variable.read():
            raise UnknownBackendError(f"environment variable GDN_BACKEND: {error}") from None
        raise
    return list(dict.fromkeys(names))


def framework_request(device: torch.device, backend: str | None = None) -> tuple[str, bool]:
    """The request of a call that comes from a framework with a path of its own, and whether gdn
    must run it. "auto" on a GPU need not, and means gdn's own kernels, the backends of "auto" but
    fla and torch: those two are no help there. backend: as in `gdn.gated_delta_net`."""
    request = request_in_force(backend)[0]
    if request != "auto" or device.type == "cpu":
        return request, True
    return OWN_KERNELS, False


def _automatic_names(own: bool) -> list[str]:
    """The backends of "auto", or with `own` of OWN_KERNELS, highest priority first."""
    found = {name: find_backend(name).priority for name in backend_names()}
    ranks = {name: rank for name, rank in found.items() if rank is not None}
    names = sorted(ranks, key=ranks.__getitem__, reverse=True)
    return [name for name in names if not (own and name in ("fla", "torch"))]


def _check_request(request: object, argument: str) -> None:
    """TypeError unless the request is a str."""
    if not isinstance(request, str):
        raise TypeError(
            f"{argument} must be a str, got {type(request).__name__}; "
            "write several backends as 'tilelang,triton'"
        )


def request_in_force(backend: str | None = None) -> tuple[str, str]:
    """The request that a call with this backend= argument makes, and where it comes from."""
    if backend is not None:
        _check_request(backend, "backend")
        return backend, "backend= argument"
    from_context = _context.get()
    if from_context is not None:
        return from_context, "use_backend"
    if _default is not None:
        return _default, "set_default_backend"
    from_environment = _variable.read()
    if from_environment is not None:
        return from_environment, "GDN_BACKEND"
    return "auto", "default"


def request(backend: str | None) -> str:
    """The request in force. torch.compile treats it as a constant, with its value while tracing."""
    return request_in_force(backend)[0]


# the mark that torch.compiler.assume_constant_result sets; the decorator imports Dynamo and Triton
request._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block (and this thread or task), calls without backend= use this name, list or
    "auto"."""
    parse_request(name, "name")
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def set_default_backend(name: str | None) -> None:
    """Make calls without backend= use this name, list or "auto" in the whole process; None removes
    the default."""
    global _default
    if name is not None:
        parse_request(name, "name")
    _default = name


def find_reasons(name: str, problem: Problem, given: Call | PoolCall | None = None) -> list[str]:
    """Every reason why the named backend cannot run the problem; empty if it can. given: the call,
    if there is one, for reasons that only it tells (`Backend.unprepared`)."""
    backend = find_backend(name)
    unavailable = registry.why_unavailable(backend)
    reasons = [] if unavailable is None else [unavailable]
    reasons += reasons_against(backend.capabilities, problem)
    if reasons:
        return reasons
    asked = "unsupported"
    try:
        if (reasons := backend.unsupported(problem)) or given is None:
            return reasons
        asked = "unprepared"
        return backend.unprepared(given, problem.needs_grad)
    except Exception as error:  # another package's error must not break gdn
        return [registry.raised(asked, error)]


def resolve(request: str, problem: Problem, given: Call | PoolCall | None = None) -> Backend:
    """The first backend of the request that can run the problem, or BackendUnsupportedError with
    every reason. A pinned request (`registry.pin`) is not checked again."""
    if registry.is_pinned(request):
        return find_backend(request)
    reasons: dict[str, list[str]] = {}
    for name in parse_request(request):
        why = find_reasons(name, problem, given)
        if not why:
            slow = name == "torch" and problem.device == "cuda" and "torch" not in request
            if slow and torch.cuda.is_available():  # else the tensors are fake, and nothing runs
                _warn_slow(reasons)
            return find_backend(name)
        reasons[name] = why
    raise BackendUnsupportedError(request, problem, reasons)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _warn_slow(reasons: dict[str, list[str]]) -> None:
    """Warn once per process that plain PyTorch runs although the tensors are on a GPU."""
    if not _warn_once.cache_info().currsize:
        why = "".join(f"\n  {name}: {'; '.join(r)}" for name, r in reasons.items())
        _warn_once(
            f"gdn runs on the slow torch backend although the tensors are on a GPU, because{why}"
        )


def choose(request: str, call: Call, needs_grad: bool) -> Chosen:
    """Validate a call, resolve the request for it, and make the backend's plan. The result is
    remembered: a repeated call costs one look-up."""
    key = describe_choice(request, call, needs_grad)
    if (chosen := _chosen.get(key)) is None:
        validate(call)
        chosen = _remember(key, resolve(request, describe(call, needs_grad), call), call)
    return chosen


def describe_choice(request: str, call: Call, needs_grad: bool) -> tuple[object, ...]:
    """What the choice for a call depends on."""
    tensors: tuple[Tensor | None, ...] = call[:CALL_TENSORS]  # type: ignore[assignment]
    return (
        registry.generation,
        request,
        needs_grad,
        # inline, because a function call per tensor would take a fifth of the look-up's time
        *[None if x is None else (x.shape, x.dtype, x.device) for x in tensors],
        math.isfinite(call.scale),
        call[CALL_TENSORS + 1 :],
    )


def choose_for_pool(request: str, given: PoolCall) -> Chosen:
    """`choose` for a call on a pool."""
    call: Call = given[0]
    end = POOL_TENSORS[type(given)]
    tensors: tuple[Any, ...] = call[:CALL_TENSORS] + given[1:end]
    key = (
        registry.generation,
        request,
        type(given),
        *[
            None if x is None else (x.shape, x.is_contiguous() or x.stride(), x.dtype, x.device)
            for x in tensors
        ],
        math.isfinite(call.scale),
        call[CALL_TENSORS + 1 :],
        given[end:],
    )
    if (chosen := _chosen.get(key)) is None:
        validate_pool_call(given)
        chosen = _remember(key, resolve(request, describe_pool_call(given), given), given)
    return chosen


def _remember(key: tuple[object, ...], backend: Backend, call: Call | PoolCall) -> Chosen:
    if len(_chosen) >= _CHOSEN_LIMIT:
        _chosen.clear()
    plan = CheckedPlan(backend, make_plan(backend, call))
    _chosen[key] = chosen = Chosen(plan, registry.pin(backend))
    return chosen


def precompile(request: str, call: Call | PoolCall, problem: Problem) -> tuple[str, bool]:
    """Compile the kernels that a call like this one needs. Returns the backend's name, and whether
    it compiles anything before its first call."""
    backend = resolve(request, problem, call)
    if problem.context_parallel and isinstance(call, Call):
        call = call_of_a_rank(call, backend)
    return backend.name, make_plan(backend, call).precompile(call, problem.needs_grad)
