"""Which backend runs one rank's part of a call, and its summaries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gdn import dispatch, registry
from gdn.problem import Call, describe
from gdn.validation import validate

_pinned: dict[tuple[object, ...], str] = {}
_LIMIT = 4096


def pin(request: str, call: Call, needs_grad: bool) -> str:
    """Validate a call and resolve the request for it: the pinned request of the backend. It is
    remembered, as `gdn.dispatch.choose` does, but for calls with symbols as sizes."""
    if registry.is_pinned(request):
        return request
    key: Any = dispatch.describe_choice(request, call, needs_grad)
    try:
        pinned = _pinned.get(key)
    except TypeError:  # symbols have no hash
        key = pinned = None
    if pinned is None:
        validate(call)
        problem = replace(describe(call, needs_grad), initial_state=True, context_parallel=True)
        pinned = registry.pin(dispatch.resolve(request, problem))
        if len(_pinned) >= _LIMIT:
            _pinned.clear()
        if key:
            _pinned[key] = pinned
    return pinned
