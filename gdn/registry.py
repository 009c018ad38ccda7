"""The backends by name: built in, registered, or from entry points of other packages."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import math
import warnings
from dataclasses import dataclass

from gdn.backend import Backend, Capabilities

BUILTIN = ("tilelang", "triton", "fla", "torch")
"""Backends that live in gdn.backends, imported by name when first needed."""

ENTRY_POINT_GROUP = "gdn.backends"

generation = 0
"""Grows whenever a backend is registered or removed; part of the keys in dispatch's cache."""

_backends: dict[str, Backend] = {}
_pinned: dict[str, Backend] = {}


class UnknownBackendError(ValueError):
    """A requested backend's name is not registered."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One row of `gdn.list_backends()`: `reason` says why a backend is not available in this
    process."""

    name: str
    summary: str
    available: bool
    reason: str | None
    priority: int | None
    capabilities: Capabilities


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Add a backend under `backend.name`. TypeError if it is not an instance of Backend with the
    class variables of one; ValueError if the name is taken (unless replace) or not a plain word."""
    global generation
    _check_backend_type(backend)
    name = backend.name
    if not name.isidentifier() or name == "auto":
        raise ValueError(
            f"a backend's name must be a plain word other than 'auto', got {name!r}; rename it"
        )
    if not replace and (name in BUILTIN or name in _backends):
        raise ValueError(
            f"backend {name!r} is registered already; pass replace=True to take its place"
        )
    _backends[name] = backend
    generation += 1


_CLASS_VARIABLES = {"name": str, "summary": str, "capabilities": Capabilities}


def _check_backend_type(backend: object) -> None:
    """TypeError unless the object is a Backend that says what dispatch needs to know of it."""
    if isinstance(backend, type):
        raise TypeError(
            f"backend must be an instance, got the class {backend.__name__}; "
            f"pass {backend.__name__}()"
        )
    if not isinstance(backend, Backend):
        raise TypeError(
            f"backend must be a gdn.Backend, got {type(backend).__name__}; derive a class from it"
        )
    for name, wanted in _CLASS_VARIABLES.items():
        value = getattr(backend, name, None)
        if not isinstance(value, wanted):
            raise TypeError(
                f"{name} of backend {type(backend).__name__} must be a {wanted.__name__}, got "
                f"{value!r}; set it in the class"
            )
    if not isinstance(backend.priority, int | float | None):
        raise TypeError(
            f"priority of backend {backend.name!r} must be a number or None, got "
            f"{backend.priority!r}; None keeps it out of 'auto'"
        )


def unregister_backend(name: str) -> None:
    """Remove a registered backend. A built-in one is loaded again when next needed. Unknown names
    are ignored."""
    global generation
    _backends.pop(name, None)
    generation += 1


def pin(backend: Backend) -> str:
    """A request that always means this instance, even if its name is registered anew. With it
    backward runs on the backend that ran forward.

    It ends with the number of the instance among those of its name, which another process most
    likely counts alike: compilers keep graphs, with the request in them, for later processes.
    """
    for request, pinned in _pinned.items():
        if pinned is backend:
            return request
    number = sum(pinned.name == backend.name for pinned in _pinned.values())
    request = f"{backend.name}#{number}"
    _pinned[request] = backend
    return request


def is_pinned(request: str) -> bool:
    """Whether `pin` made this request."""
    return request in _pinned


@functools.cache
def _load_entry_points() -> None:
    """Register the entry points of other packages. One that fails gives a warning."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in BUILTIN or entry.name in _backends:
            continue
        try:
            loaded = entry.load()
            register_backend(loaded() if isinstance(loaded, type) else loaded)
        except (Exception, SystemExit) as error:  # another package's error must not break gdn
            warnings.warn(
                f"entry point {entry.name!r} ({entry.value}) of group {ENTRY_POINT_GROUP} gave "
                f"no backend: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def find_backend(name: str) -> Backend:
    """The backend of that name. UnknownBackendError, with similar names, if there is none. A pinned
    request of another process means the name in it."""
    backend = _backends.get(name) or _pinned.get(name)
    if backend is not None:
        return backend
    name = name.partition("#")[0]
    if name in _backends:
        return _backends[name]
    if name in BUILTIN:
        loaded: Backend = importlib.import_module(f"gdn.backends.{name}").BACKEND
        return _backends.setdefault(name, loaded)
    _load_entry_points()
    if name in _backends:
        return _backends[name]
    names = backend_names()
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(names)}"
    )
    raise UnknownBackendError(f"unknown backend {name!r}; {hint}")


def backend_names() -> list[str]:
    """Every registered name; first the backends of "auto", in its order."""
    _load_entry_points()
    for name in BUILTIN:
        find_backend(name)

    def rank(name: str) -> tuple[float, str]:
        priority = _backends[name].priority
        return math.inf if priority is None else -priority, name

    return sorted(_backends, key=rank)


def why_unavailable(backend: Backend) -> str | None:
    """`backend.unavailable()`, or the exception that it raises as a reason."""
    try:
        return backend.unavailable()
    except Exception as error:  # another package's error must not break gdn
        return raised("unavailable", error)


def raised(method: str, error: Exception) -> str:
    """The reason against a backend whose method raises."""
    return f"its {method}() raises {type(error).__name__}: {error}"


def list_backends() -> tuple[BackendInfo, ...]:
    """Every backend, with whether it can run in this process and why not; first the backends of
    "auto", in its order."""
    rows = []
    for name in backend_names():
        backend = find_backend(name)
        reason = why_unavailable(backend)
        rows.append(
            BackendInfo(
                name,
                backend.summary,
                reason is None,
                reason,
                backend.priority,
                backend.capabilities,
            )
        )
    return tuple(rows)
