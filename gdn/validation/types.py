"""Checks that come before those of shapes: arguments are tensors, without forward-mode tangents,
and in decode without gradients."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd import forward_ad

from gdn.problem import CALL_TENSORS, DIFFERENTIABLE, Call, Step

DEFINITION = "gdn.definition.gated_delta_rule(gdn.problem.Call(q, k, v, g, beta, scale=K**-0.5))"
"""What error messages recommend where the op has no derivative. A Call's default scale is 1."""


def no_tensor(name: str, x: object, remedy: str = "see torch.as_tensor") -> TypeError:
    """The TypeError for an argument x that must be a tensor and is not."""
    return TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; {remedy}")


def tensors_of(call: Call | Step) -> Iterable[tuple[str, Tensor | None]]:
    """Name and value of every argument that is a tensor or None."""
    if isinstance(call, Step):
        yield from tensors_of(call.call)
        yield from zip(Step._fields[1:-1], call[1:-1], strict=True)
    else:
        yield from zip(Call._fields[:CALL_TENSORS], call[:CALL_TENSORS], strict=True)


def check_types(call: Call | Step) -> None:
    """TypeError if a tensor argument is not a tensor. The op's schema checks all other types."""
    for name, x in tensors_of(call):
        if not (x is None or isinstance(x, Tensor)):
            raise no_tensor(name, x)


def refuse_tangents(call: Call | Step) -> None:
    """RuntimeError if an input has a forward-mode tangent, which the op would drop."""
    op = "gated_delta_net" if isinstance(call, Call) else "gated_delta_net_decode"
    differentiable = (*DIFFERENTIABLE, "state")
    for name, x in tensors_of(call):
        if x is None or name not in differentiable:
            continue
        if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError(
                f"gdn.{op} has no forward-mode derivative, and {name} has a tangent; use "
                f"backward, or {DEFINITION}"
            )


def refuse_gradients(step: Step) -> None:
    """RuntimeError if an input of a decode step requires grad."""
    for name, x in tensors_of(step):
        if getattr(x, "requires_grad", False):  # `check_types` reports other types
            raise RuntimeError(
                f"gdn.gated_delta_net_decode is not differentiable, and {name} requires grad; "
                "call it under torch.no_grad(), or use gdn.gated_delta_net"
            )
