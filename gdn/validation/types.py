"""Checks that come before those of shapes: arguments have the right types, and tensors are without
forward-mode tangents, in decode also without gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gdn.problem import (
    CALL_TENSORS,
    DIFFERENTIABLE,
    FLAGS,
    POOL_TENSORS,
    Call,
    PoolCall,
    Step,
)

DEFINITION = "gdn.definition.gated_delta_rule(gdn.problem.Call(q, k, v, g, beta, scale=K**-0.5))"
"""What error messages recommend where the op has no derivative. A Call's default scale is 1."""


def no_tensor(name: str, x: object, remedy: str = "see torch.as_tensor") -> TypeError:
    """The TypeError for an argument x that must be a tensor and is not."""
    return TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; {remedy}")


def tensors_of(call: Call | PoolCall) -> Iterable[tuple[str, Tensor | None]]:
    """Name and value of every argument that is a tensor or None."""
    if isinstance(call, Call):
        yield from zip(Call._fields[:CALL_TENSORS], call[:CALL_TENSORS], strict=True)
    else:
        end = POOL_TENSORS[type(call)]
        yield from tensors_of(call.call)
        yield from zip(call._fields[1:end], call[1:end], strict=True)


def check_types(call: Call | PoolCall) -> None:
    """TypeError if a tensor argument is not a tensor, a flag not a bool, or another option not a
    number. What converts without loss is taken: 1 for True, numpy's numbers, 0-d tensors."""
    for name, x in tensors_of(call):
        if not (x is None or isinstance(x, Tensor)):
            raise no_tensor(name, x)
    own = call if isinstance(call, Call) else call.call
    flags = {name: getattr(own, name) for name in FLAGS}
    if isinstance(call, Step):
        flags["leading_column"] = call.leading_column
    for name, x in flags.items():
        may_be_none = name in FLAGS  # it means False, which is their default
        if not ((x is None and may_be_none) or _converts(x, float)):
            raise TypeError(f"{name} must be a bool, got {_shown(x)}; pass True or False")
    bound = own.gate_lower_bound
    if not (bound is None or _converts(bound, float)):
        raise TypeError(f"gate_lower_bound must be a number, got {_shown(bound)}; pass -5.0")
    if not _converts(own.scale, float):
        raise TypeError(f"scale must be a number, got {_shown(own.scale)}; leave it out for K^-0.5")
    if not isinstance(call, Call) and not _converts(call.null_index, operator.index):
        raise TypeError(f"null_index must be an int, got {_shown(call.null_index)}; pass -1")


def _shown(x: object) -> str:
    return f"{type(x).__name__} {x!r}"


def _converts(x: Any, into: Callable[[Any], object]) -> bool:
    """Whether x is a number, a symbol of one, or converts to one; a text never does."""
    if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool):
        return True
    try:
        into(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(x, str | bytes)


def op_name(call: Call | PoolCall) -> str:
    """The public function that makes such calls."""
    if isinstance(call, Call):
        return "gated_delta_net"
    return "gated_delta_net_decode" if isinstance(call, Step) else "gated_delta_net_prefill"


def refuse_tangents(call: Call | PoolCall) -> None:
    """RuntimeError if an input has a forward-mode tangent, which the op would drop."""
    op = op_name(call)
    differentiable = (*DIFFERENTIABLE, "state")
    for name, x in tensors_of(call):
        if x is None or name not in differentiable:
            continue
        if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError(
                f"gdn.{op} has no forward-mode derivative, and {name} has a tangent; use "
                f"backward, or {DEFINITION}"
            )


def refuse_gradients(given: PoolCall) -> None:
    """RuntimeError if an input of a call on a pool requires grad."""
    tensors = given.call[:CALL_TENSORS] + given[1 : POOL_TENSORS[type(given)]]
    # a loop over names would take a fifth of a decode step's time on the host
    if not any([getattr(x, "requires_grad", False) for x in tensors]):  # noqa: C419
        return
    for name, x in tensors_of(given):
        if getattr(x, "requires_grad", False):  # `check_types` reports other types
            raise RuntimeError(
                f"gdn.{op_name(given)} is not differentiable, and {name} requires grad; "
                "call it under torch.no_grad(), or use gdn.gated_delta_net"
            )


def refuse_transforms() -> None:
    """RuntimeError under torch.func.grad, vjp and the like, which cannot see into the op."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "gdn.gated_delta_net does not support the transforms of torch.func, such as grad and "
            f"vjp; use torch.autograd.grad, or {DEFINITION}"
        )
