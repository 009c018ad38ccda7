"""Compiling, ahead of the first call, what calls like it need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gdn import dispatch
from gdn.api import _make_call, _make_step, _needs_grad
from gdn.problem import Call, Problem, Step, describe, describe_step
from gdn.validation import validate, validate_step


def warmup(
    *args: Any,
    backward: bool | None = None,
    backend: str | None = None,
    sm: int | None = None,
    **options: Any,
) -> str:
    """Compile what a call like this one needs, kernels side by side; compute nothing.

    Args:
        *args, **options: as `gdn.gated_delta_net`'s, or with state= as those of
            `gdn.gated_delta_net_decode`.
        backward: also what its gradients need. None: if an input requires grad.
        backend: as in `gdn.gated_delta_net`.
        sm: compute capability times ten of the GPU to compile for (90: Hopper). The tensors may
            then be on the meta device, and there need be no GPU, if the backend can do without.

    Returns:
        The name of the backend that would run the call. One that compiles nothing ahead of its
        first call does nothing here.

    Raises:
        ValueError, BackendUnsupportedError, UnknownBackendError: as the call would.
    """
    call: Call | Step
    if "state" in options:
        call = _make_step(*args, **options)
        validate_step(call)
        problem = describe_step(call)
    else:
        call = _make_call(*args, **options)
        validate(call)
        backward = _needs_grad(call) if backward is None else backward
        problem = describe(call, backward)
    if sm is not None:
        problem = replace(problem, device="cuda", sm=sm)
    return warm(dispatch.request_in_force(backend)[0], call, problem)


def warm(request: str, call: Call | Step, problem: Problem) -> str:
    """The same for a call or step that is made and described already."""
    backend = dispatch.resolve(request, problem).bind(call)
    backend.warm(call, problem.needs_grad)
    return backend.name
