"""Which calls may skip PyTorch's dispatcher, which takes a quarter of a call's time on the host."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gdn.problem import (
    CALL_TENSORS,
    POOL_TENSORS,
    Call,
    PoolCall,
    Prefill,
    Step,
    argument_types,
)
from gdn.validation import check_types

CALL_ARGUMENTS = len(argument_types(Call))
"""How many arguments of an op are fields of a `Call`: the first ones."""
_POOL_END: dict[Any, int] = {Call: CALL_ARGUMENTS}
_POOL_END |= {kind: CALL_ARGUMENTS + end - 1 for kind, end in POOL_TENSORS.items()}
_TYPES: dict[Any, set[type]] = {Tensor: {Tensor, torch.nn.Parameter}}
_TYPES[Tensor | None] = _TYPES[Tensor] | {type(None)}
_TYPES[float | None] = {float, type(None)}
_ALLOWED = {
    kind: [_TYPES.get(hint, {hint}) for hint in argument_types(kind).values()]
    for kind in (Call, Step, Prefill)
}


def needs_dispatcher(kind: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether the call must go through PyTorch's dispatcher.

    It must if a mode, a transform, a tracer or a profiler is active, if an argument is of a Tensor
    subclass or not of the schema's type, if a tensor is a negated view (`z.conj().imag`), or if the
    tensors are on the meta device (fake kernels run there, never a backend).
    Conjugated, sparse, nested and quantised tensors are refused by their dtype or layout. What the
    dispatcher spends its time on is mostly to convert arguments to its own types and back.
    """
    if not _are_plain(kind, *map(type, arguments)):
        check_types(Call(*arguments) if kind is Call else as_pool_call(kind, *arguments))
        return True
    return bool(
        arguments[0].is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
        or _any_negative(arguments[:CALL_TENSORS] + arguments[CALL_ARGUMENTS : _POOL_END[kind]])
    )


def _any_negative(tensors: tuple[Tensor | None, ...]) -> bool:
    for x in tensors:  # noqa: SIM110, since any() takes half as long again
        if x is not None and x.is_neg():
            return True
    return False


@functools.lru_cache(maxsize=256)
def _are_plain(kind: Any, *types: type[Any]) -> bool:
    """Whether the arguments of an op have the types that the schema names."""
    return all(found in allowed for found, allowed in zip(types, _ALLOWED[kind], strict=True))


def as_pool_call(kind: type[PoolCall], *arguments: Any) -> PoolCall:
    """The Step or Prefill of the arguments of its op."""
    return kind(Call(*arguments[:CALL_ARGUMENTS]), *arguments[CALL_ARGUMENTS:])
