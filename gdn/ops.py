"""`torch.ops.gdn.forward`, `.backward` and `.decode`: schemas, fake kernels and autograd, the same
for every backend.

torch.compile sees one node for forward and one for backward. The `backend` argument is a request as
in `gdn.dispatch`, fixed when the call is made or traced. The ops resolve it from metadata, so that
fake and real kernels agree. If gradients are needed, autograd resolves it once and pins the backend
for both passes.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gdn import dispatch, registry
from gdn.backend import Forward, Gradients
from gdn.calls import autocasts
from gdn.problem import CALL_TENSORS, Call, Step, argument_types, describe, describe_step
from gdn.validation import (
    DEFINITION,
    check_cu_seqlens,
    check_slots,
    check_types,
    refuse_tangents,
    validate,
    validate_step,
)

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool",
}  # fmt: skip
_TENSORS: dict[Any, set[type]] = {Tensor: {Tensor, torch.nn.Parameter}}
_TENSORS[Tensor | None] = _TENSORS[Tensor] | {type(None)}
_ALLOWED = {
    kind: [_TENSORS.get(hint, {hint}) for hint in argument_types(kind).values()]
    for kind in (Call, Step)
}
_CALL = len(argument_types(Call))


def _schema(kind: type[Call | Step], **mutated: str) -> str:
    types = {name: _SCHEMA_TYPES[hint] for name, hint in argument_types(kind).items()} | mutated
    return ", ".join([*(f"{type_} {name}" for name, type_ in types.items()), "str backend"])


_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in Gradients._fields)
torch.library.define(
    "gdn::forward",
    f"({_schema(Call)}, bool save) -> (Tensor o, Tensor final_state, Tensor[] saved)",
)
torch.library.define(
    "gdn::backward",
    f"({_schema(Call)}, Tensor[] saved, Tensor grad_o, Tensor? grad_final_state) -> ({_GRADIENTS})",
)
torch.library.define("gdn::decode", f"({_schema(Step, state='Tensor(a!)')}) -> Tensor")


def run_forward(call: Call, request: str, save: bool) -> tuple[Tensor, Tensor | None]:
    """Call the op: o, and the final state if call.output_final_state. With `save` it keeps what
    backward needs."""
    if forward_ad._current_level >= 0:
        refuse_tangents(call)
    if save or torch.compiler.is_compiling() or _needs_dispatcher(Call, call):
        o, final_state, _ = torch.ops.gdn.forward(*call, request, save)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            o, final_state, _ = _forward(call, request, save)
    return o, final_state if call.output_final_state else None


def run_decode(step: Step, request: str) -> Tensor:
    """Call the op: return o and update step.state in place. Without gradients."""
    if forward_ad._current_level >= 0:
        refuse_tangents(step)
    arguments = (*step.call, *step[1:])
    if torch.compiler.is_compiling() or _needs_dispatcher(Step, arguments):
        return torch.ops.gdn.decode(*arguments, request)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _decode(step, request)


def _needs_dispatcher(kind: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether the call must go through PyTorch's dispatcher.

    It must if a mode, a transform, a tracer or a profiler is active, if an argument is of a Tensor
    subclass or not of the schema's type, or if a tensor is a negated view (`z.conj().imag`).
    Conjugated, sparse, nested and quantised tensors are refused by their dtype or layout. All other
    calls skip the dispatcher, which takes a quarter of a call's time on the host, mostly to convert
    the arguments to its own types and back.
    """
    if not _are_plain(kind, *map(type, arguments)):
        check_types(Call(*arguments) if kind is Call else _step(*arguments))
        return True
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
        or _any_negative(arguments[:CALL_TENSORS] + arguments[_CALL:-1])
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


def _step(*arguments: Any) -> Step:
    """The Step of the arguments of `torch.ops.gdn.decode`."""
    return Step(Call(*arguments[:_CALL]), *arguments[_CALL:])


def _surroundings(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off (a backend chooses its own precisions) and x's device current."""
    autocast = autocasts(x)
    elsewhere = x.is_cuda and x.get_device() != torch._C._cuda_getDevice()
    if not (autocast or elsewhere):
        return nullcontext()
    stack = ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device(x.device))
    return stack


def _has_tokens(call: Call) -> bool:
    return call.q.numel() > 0  # H and K are at least 1


def _forward(call: Call, request: str, save: bool) -> Forward:
    plan, pinned = dispatch.choose(request, call, save)
    check_cu_seqlens(call)
    with _surroundings(call.q):
        if _has_tokens(call):
            return plan.forward(call, save)
        saved = registry.find_backend(pinned).saved_like(call) if save else []
        final_state = call.q.new_zeros(call.state_shape, dtype=call.state_dtype)
        if call.initial_state is not None:
            final_state.copy_(call.initial_state)
        return Forward(call.v.new_empty(call.v.shape), final_state, saved)


@torch.library.impl("gdn::forward", "CompositeExplicitAutograd")
def _forward_op(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = Call(*args[:_CALL])
    o, final_state, saved = _forward(call, *args[_CALL:])
    if final_state is None or not call.output_final_state:
        final_state = call.q.new_empty(0)
    return o, final_state, saved


@torch.library.register_fake("gdn::forward")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call, (request, save) = Call(*args[:_CALL]), args[_CALL:]
    validate(call)
    backend = dispatch.resolve(request, describe(call, save))
    shape = call.state_shape if call.output_final_state else (0,)
    dtype = call.state_dtype if call.output_final_state else call.q.dtype
    saved = backend.saved_like(call) if save else []
    return call.v.new_empty(call.v.shape), call.q.new_empty(shape, dtype=dtype), saved


def _pin(request: str, call: Call) -> str:
    """The pinned request of the backend that runs this call and its gradients."""
    if not _needs_dispatcher(Call, call):
        return dispatch.choose(request, call, True).pinned
    validate(call)  # while tracing, sizes may be symbols, and a plan needs numbers
    return registry.pin(dispatch.resolve(request, describe(call, True)))


class _Differentiable(torch.autograd.Function):
    """`torch.ops.gdn.forward` with gradients. Arguments: the options, the dispatch keys below
    autograd, then the tensors."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], keys: Any, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            op = torch.ops.gdn.forward.default
            o, final_state, saved = op.redispatch(keys, *tensors, *options, True)
        ctx.save_for_backward(*tensors, *saved)
        ctx.options = options
        ctx.mark_non_differentiable(*saved)
        return o, final_state, *saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_o, grad_final_state, *_ = grads
        tensors = ctx.saved_tensors  # read once: checkpointing recomputes at every access
        *options, pinned = ctx.options
        call, saved = Call(*tensors[:CALL_TENSORS], *options), list(tensors[CALL_TENSORS:])
        if grad_o is None:
            grad_o = call.v.new_zeros(call.v.shape)
        if not call.output_final_state:
            grad_final_state = None
        found = torch.ops.gdn.backward(*call, pinned, saved, grad_o, grad_final_state)
        gradients = dict(zip(Gradients._fields, found, strict=True))
        needed = zip(Call._fields, tensors[:CALL_TENSORS], ctx.needs_input_grad[2:], strict=False)
        return (
            None,
            None,
            *(gradients[name] if x is not None and need else None for name, x, need in needed),
        )


def _forward_autograd(keys: Any, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    below, (request, save) = keys & torch._C._after_autograd_keyset, args[_CALL:]
    if not (save and torch.is_grad_enabled() and torch._C._any_requires_grad(*args[:CALL_TENSORS])):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.gdn.forward.default.redispatch(below, *args)  # type: ignore[no-any-return]
    options = (*args[CALL_TENSORS:_CALL], _pin(request, Call(*args[:_CALL])))
    o, final_state, *saved = _Differentiable.apply(options, below, *args[:CALL_TENSORS])  # type: ignore[no-untyped-call]
    return o, final_state, saved


_LIBRARY: Any = torch.library.Library("gdn", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.impl("forward", _forward_autograd, "Autograd", with_keyset=True)


def _gradients_like(call: Call) -> list[Tensor]:
    """Uninitialised contiguous gradients, an empty tensor for each input that is None."""
    return [call.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in call.differentiable]


@torch.library.impl("gdn::backward", "CompositeExplicitAutograd")
def _backward(*args: Any) -> tuple[Tensor, ...]:
    call, (request, saved, grad_o, grad_final_state) = Call(*args[:_CALL]), args[_CALL:]
    plan = dispatch.choose(request, call, True).plan
    with _surroundings(call.q):
        if _has_tokens(call):
            gradients = plan.backward(call, saved, grad_o, grad_final_state)
            return tuple(call.q.new_empty(0) if x is None else x for x in gradients)
        zeros = Gradients(*(x.zero_() for x in _gradients_like(call)))
        if call.initial_state is not None and grad_final_state is not None:
            zeros.initial_state.copy_(grad_final_state)  # type: ignore[union-attr]
        return tuple(zeros)  # type: ignore[arg-type]


@torch.library.register_fake("gdn::backward")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_gradients_like(Call(*args[:_CALL])))


def _refuse_double_backward(ctx: Any, *grads: object) -> NoReturn:
    raise RuntimeError(
        f"gdn.gated_delta_net has no double backward; use {DEFINITION}, which is differentiable "
        "any number of times, or take gradients without create_graph=True"
    )


torch.library.register_autograd("gdn::backward", _refuse_double_backward)


@torch.library.register_vmap("gdn::forward")
def _refuse_vmap(*args: object) -> NoReturn:
    raise RuntimeError(
        "gdn.gated_delta_net does not support torch.func.vmap; fold the mapped dimension into B"
    )


def _decode(step: Step, request: str) -> Tensor:
    plan = dispatch.choose_decode(request, step).plan
    call = step.call
    check_cu_seqlens(call)
    check_slots(step)
    if not _has_tokens(call):
        return call.v.new_empty(call.v.shape)
    with _surroundings(call.q):
        o = plan.decode(step)
    if not step.state.is_inference():
        torch.autograd.graph.increment_version(step.state)
    return o


@torch.library.impl("gdn::decode", "CompositeExplicitAutograd")
def _decode_op(*args: Any) -> Tensor:
    return _decode(_step(*args[:-1]), args[-1])


@torch.library.register_fake("gdn::decode")
def _decode_fake(*args: Any) -> Tensor:
    step = _step(*args[:-1])
    validate_step(step)
    dispatch.resolve(args[-1], describe_step(step))
    return step.call.v.new_empty(step.call.v.shape)
