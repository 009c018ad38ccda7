"""`torch.ops.gdn.forward` and `.backward`: schemas, fake kernels and autograd, the same for every
backend. `gdn.pool_ops` has the ops on a pool of states.

torch.compile sees one node for forward and one for backward. The `backend` argument is a request as
in `gdn.dispatch`, fixed when the call is made or traced. The ops resolve it from metadata, so that
fake and real kernels agree. If gradients are needed, autograd resolves it once and pins the backend
for both passes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gdn import dispatch, registry
from gdn.backend import Forward, Gradients
from gdn.calls import autocasts
from gdn.problem import CALL_TENSORS, Call, PoolCall, argument_types, describe
from gdn.shortcut import CALL_ARGUMENTS, needs_dispatcher
from gdn.validation import (
    DEFINITION,
    check_cu_seqlens,
    refuse_tangents,
    refuse_transforms,
    validate,
)

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?",
    int: "int", bool: "bool",
}  # fmt: skip


def schema(kind: type[Call | PoolCall], **mutated: str) -> str:
    """The arguments of an op that takes the fields of `kind`, and the request. mutated: the types
    of the fields that the op writes to."""
    types = {name: _SCHEMA_TYPES[hint] for name, hint in argument_types(kind).items()} | mutated
    return ", ".join([*(f"{type_} {name}" for name, type_ in types.items()), "str backend"])


GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in Gradients._fields)
torch.library.define(
    "gdn::forward",
    f"({schema(Call)}, bool save) -> (Tensor o, Tensor final_state, Tensor[] saved)",
)
torch.library.define(
    "gdn::backward",
    f"({schema(Call)}, Tensor[] saved, Tensor grad_o, Tensor? grad_final_state) -> ({GRADIENTS})",
)


def run_forward(call: Call, request: str, save: bool) -> tuple[Tensor, Tensor | None]:
    """Call the op: o, and the final state if call.output_final_state. With `save` it keeps what
    backward needs."""
    if forward_ad._current_level >= 0:
        refuse_tangents(call)
    if save or torch.compiler.is_compiling() or needs_dispatcher(Call, call):
        o, final_state, _ = torch.ops.gdn.forward(*call, request, save)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            o, final_state, _ = _forward(call, request, save)
    return o, final_state if call.output_final_state else None


def surroundings(x: Tensor) -> AbstractContextManager[object]:
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


def has_tokens(call: Call) -> bool:
    """Whether there is anything to compute."""
    return call.q.numel() > 0 and call.sequences > 0  # H and K are at least 1


def _forward(call: Call, request: str, save: bool) -> Forward:
    plan, pinned = dispatch.choose(request, call, save)
    check_cu_seqlens(call)
    with surroundings(call.q):
        if has_tokens(call):
            return plan.forward(call, save)
        saved = (registry.find_backend(pinned).saved_like(call) if save else None) or []
        final_state = call.q.new_zeros(call.state_shape, dtype=call.state_dtype)
        if call.initial_state is not None:
            final_state.copy_(call.initial_state)
        return Forward(call.v.new_zeros(call.v.shape), final_state, saved)


@torch.library.impl("gdn::forward", "CompositeExplicitAutograd")
def _forward_op(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = Call(*args[:CALL_ARGUMENTS])
    o, final_state, saved = _forward(call, *args[CALL_ARGUMENTS:])
    if final_state is None or not call.output_final_state:
        final_state = call.q.new_empty(0)
    return o, final_state, saved


@torch.library.register_fake("gdn::forward")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call, (request, save) = Call(*args[:CALL_ARGUMENTS]), args[CALL_ARGUMENTS:]
    validate(call)
    backend = dispatch.resolve(request, describe(call, save))
    shape = call.state_shape if call.output_final_state else (0,)
    dtype = call.state_dtype if call.output_final_state else call.q.dtype
    saved = backend.saved_like(call) if save else []
    if saved is None:
        raise RuntimeError(
            f"torch.compile must know what backend {backend.name!r} saves for backward before it "
            "runs, and only its forward knows that; use it without torch.compile"
        )
    return call.v.new_empty(call.v.shape), call.q.new_empty(shape, dtype=dtype), saved


def _pin(request: str, call: Call) -> str:
    """The pinned request of the backend that runs this call and its gradients."""
    if not needs_dispatcher(Call, call):
        return dispatch.choose(request, call, True).pinned
    validate(call)
    tensors = [x for x in call[:CALL_TENSORS] if isinstance(x, Tensor)]
    # while tracing, sizes may be symbols, and a plan needs numbers
    numbers = all(isinstance(size, int) for x in tensors for size in x.shape)
    return registry.pin(dispatch.resolve(request, describe(call, True), call if numbers else None))


class _Differentiable(torch.autograd.Function):
    """A forward op with gradients. Arguments: the names of the ops; the options with the pinned
    request, and what the op takes behind `save`; the dispatch keys below autograd; the tensors."""

    @staticmethod
    def forward(
        ctx: Any, names: Any, options: Any, more: Any, keys: Any, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            op = getattr(torch.ops.gdn, names[0]).default
            o, final_state, saved = op.redispatch(keys, *tensors, *options, True, *more)
        ctx.save_for_backward(*tensors, *saved)
        ctx.op, ctx.options, ctx.more = names[1], options, more
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
        op = getattr(torch.ops.gdn, ctx.op)
        found = op(*call, pinned, saved, grad_o, grad_final_state, *ctx.more)
        gradients = dict(zip(Gradients._fields, found, strict=True))
        needed = zip(Call._fields, tensors[:CALL_TENSORS], ctx.needs_input_grad[4:], strict=False)
        return (
            *[None] * 4,
            *(gradients[name] if x is not None and need else None for name, x, need in needed),
        )


def register_differentiable(forward: str, backward: str, pin: Callable[..., str]) -> None:
    """Make the op `forward`, which takes a call, request, save and perhaps more, differentiable by
    the op `backward`. pin(request, call, *more): the pinned request of the backend for both."""

    def autograd(keys: Any, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        below = keys & torch._C._after_autograd_keyset
        request, save, *more = args[CALL_ARGUMENTS:]
        refuse_transforms()
        needed = torch.is_grad_enabled() and torch._C._any_requires_grad(*args[:CALL_TENSORS])
        if needed and not save:
            raise RuntimeError(
                "gdn.gated_delta_net was traced or exported without gradients, and an input "
                "requires grad now; trace it with gradients on, or run it under torch.no_grad()"
            )
        if not needed:
            with torch._C._AutoDispatchBelowAutograd():
                op = getattr(torch.ops.gdn, forward).default
                return op.redispatch(below, *args)  # type: ignore[no-any-return]
        pinned = pin(request, Call(*args[:CALL_ARGUMENTS]), *more)
        options = (*args[CALL_TENSORS:CALL_ARGUMENTS], pinned)
        o, final_state, *saved = _Differentiable.apply(  # type: ignore[no-untyped-call]
            (forward, backward), options, more, below, *args[:CALL_TENSORS]
        )
        return o, final_state, saved

    _LIBRARY.impl(forward, autograd, "Autograd", with_keyset=True)


_LIBRARY: Any = torch.library.Library("gdn", "FRAGMENT")  # type: ignore[no-untyped-call]
register_differentiable("forward", "backward", _pin)


def gradients_like(call: Call) -> list[Tensor]:
    """Uninitialised contiguous gradients, an empty tensor for each input that is None."""
    return [call.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in call.differentiable]


@torch.library.impl("gdn::backward", "CompositeExplicitAutograd")
def _backward(*args: Any) -> tuple[Tensor, ...]:
    call, (request, saved, grad_o, grad_final_state) = (
        Call(*args[:CALL_ARGUMENTS]),
        args[CALL_ARGUMENTS:],
    )
    plan = dispatch.choose(request, call, True).plan
    with surroundings(call.q):
        if has_tokens(call):
            gradients = plan.backward(call, saved, grad_o, grad_final_state)
            return tuple(call.q.new_empty(0) if x is None else x for x in gradients)
        zeros = Gradients(*(x.zero_() for x in gradients_like(call)))
        if call.initial_state is not None and grad_final_state is not None:
            zeros.initial_state.copy_(grad_final_state)  # type: ignore[union-attr]
        return tuple(zeros)  # type: ignore[arg-type]


@torch.library.register_fake("gdn::backward")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(gradients_like(Call(*args[:CALL_ARGUMENTS])))


def refuse_double_backward(ctx: Any, *grads: object) -> NoReturn:
    """The derivative of an op of gradients."""
    raise RuntimeError(
        f"gdn.gated_delta_net has no double backward; use {DEFINITION}, which is differentiable "
        "any number of times, or take gradients without create_graph=True"
    )


torch.library.register_autograd("gdn::backward", refuse_double_backward)


def refuse_vmap(*args: object) -> NoReturn:
    """The vmap rule of all ops."""
    raise RuntimeError("gdn does not support torch.func.vmap; fold the mapped dimension into B")


torch.library.register_vmap("gdn::forward", refuse_vmap)
