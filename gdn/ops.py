"""`torch.ops.gdn.forward`, `.backward` and `.decode`: schema, fake and autograd, the same for every
backend.

torch.compile sees one node each way. Their `backend` argument is a request as in `gdn.dispatch`,
fixed when the call is made or traced; the backend is resolved inside, from metadata, so that the
fake and the real kernel agree.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gdn import dispatch
from gdn.backend import Forward, Gradients
from gdn.problem import CALL_TENSORS, STEP_TENSORS, Call, Step, describe, describe_step
from gdn.validation import validate, validate_step
from gdn.values import check_cu_seqlens, check_slots

_FLAGS = (
    "bool use_qk_l2norm_in_kernel, bool use_gate_in_kernel, bool use_beta_sigmoid_in_kernel, "
    "bool allow_neg_eigval, bool state_v_first, str backend"
)
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? A_log, "
    "Tensor? dt_bias, Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, Tensor? chunk_indices, "
    f"float scale, bool output_final_state, {_FLAGS}"
)
_CALL = len(Call._fields)
_FIRST_OPTION: dict[type[Any], int] = {Call: CALL_TENSORS, Step: STEP_TENSORS}
_OPTIONS = {
    kind: tuple(get_type_hints(kind)[name] for name in kind._fields[first:])
    for kind, first in _FIRST_OPTION.items()
}
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
_DEFINITION = "gdn.definition.gated_delta_rule(gdn.problem.Call(q, k, v, g, beta, scale=K**-0.5))"
"""What to call where the op has no derivative; a Call's own scale is 1."""

torch.library.define(
    "gdn::forward", f"({_INPUTS}, bool save) -> (Tensor o, Tensor final_state, Tensor[] saved)"
)
torch.library.define(
    "gdn::backward",
    f"({_INPUTS}, Tensor[] saved, Tensor grad_o, Tensor? grad_final_state) -> (Tensor grad_q, "
    "Tensor grad_k, Tensor grad_v, Tensor grad_g, Tensor grad_beta, Tensor grad_initial_state, "
    "Tensor grad_A_log, Tensor grad_dt_bias)",
)
torch.library.define(
    "gdn::decode",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, "
    "Tensor? state_indices, Tensor? num_accepted_tokens, Tensor? A_log, Tensor? dt_bias, "
    f"Tensor? cu_seqlens, float scale, int null_index, {_FLAGS}) -> Tensor",
)


def run_forward(call: Call, request: str, save: bool) -> tuple[Tensor, Tensor | None]:
    """Call the op: o, and the final state if call.output_final_state. `save` keeps what backward
    needs."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(call)
    if save or torch.compiler.is_compiling() or _must_be_seen(call):
        o, final_state, _ = torch.ops.gdn.forward(*call, request, save)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            o, final_state, _ = _forward(call, request, save)
    return o, final_state if call.output_final_state else None


def run_decode(step: Step, request: str) -> Tensor:
    """Call the op: o, and the new states in step.state. Nothing is ever differentiated here."""
    if torch.compiler.is_compiling() or _must_be_seen(step):
        return torch.ops.gdn.decode(*step, request)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _decode(step, request)


def _must_be_seen(call: Call | Step) -> bool:
    """Whether anyone may have to see the op itself: a mode, a transform, a tracer, a profiler or a
    subclass of Tensor. Where nobody does, PyTorch's dispatcher is passed by: it takes a quarter of
    what a call costs on the host, mostly to turn arguments into its own types and back."""
    if not _are_plain(type(call), *map(type, call)):  # type: ignore[arg-type]
        check_types(call)
        return True
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
    )


@functools.lru_cache(maxsize=256)
def _are_plain(kind: type[Any], *types: type[Any]) -> bool:
    """Whether the fields of a Call or Step have the types that the schema names."""
    first = _FIRST_OPTION[kind]
    return _PLAIN.issuperset(types[:first]) and types[first:] == _OPTIONS[kind]


def no_tensor(name: str, x: object) -> TypeError:
    """What is raised where the argument of this name must be a tensor, and x is none."""
    return TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; see torch.as_tensor")


def check_types(call: Call | Step) -> None:
    """TypeError if what must be a tensor is none; of all else the schema says it."""
    for name, x in zip(call._fields[: _FIRST_OPTION[type(call)]], call, strict=False):
        if not (x is None or isinstance(x, Tensor)):
            raise no_tensor(name, x)


def _refuse_tangents(call: Call) -> None:
    for name, x in zip(call._fields, call.differentiable, strict=False):
        if x is None or forward_ad.unpack_dual(x).tangent is None:  # type: ignore[no-untyped-call]
            continue
        raise RuntimeError(
            f"gdn.gated_delta_net has no forward-mode derivative, and {name} has a tangent; use "
            f"backward, or {_DEFINITION}"
        )


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


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on, and for x's device; the meta device, for one, has none to ask for."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _has_tokens(call: Call | Step) -> bool:
    return call.q.numel() > 0  # H and K are at least 1


def _forward(call: Call, request: str, save: bool) -> Forward:
    backend = dispatch.choose(request, call, save)
    check_cu_seqlens(call)
    with _surroundings(call.q):
        if _has_tokens(call):
            return backend.forward(call, save)
        o, saved = call.v.new_empty(call.v.shape), backend.saved_like(call) if save else []
        final_state = call.q.new_zeros(call.state_shape, dtype=call.state_dtype)
        if call.initial_state is not None:
            final_state.copy_(call.initial_state)
        return Forward(o, final_state, saved)


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


def _gradients_like(call: Call) -> list[Tensor]:
    """Uninitialised contiguous gradients, an empty tensor for each input that is None."""
    return [call.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in call.differentiable]


@torch.library.impl("gdn::backward", "CompositeExplicitAutograd")
def _backward(*args: Any) -> tuple[Tensor, ...]:
    call, (request, saved, grad_o, grad_final_state) = Call(*args[:_CALL]), args[_CALL:]
    backend = dispatch.choose(request, call, True)
    with _surroundings(call.q):
        if _has_tokens(call):
            gradients = backend.backward(call, saved, grad_o, grad_final_state)
            return tuple(call.q.new_empty(0) if x is None else x for x in gradients)
        zeros = Gradients(*(x.zero_() for x in _gradients_like(call)))
        if call.initial_state is not None and grad_final_state is not None:
            zeros.initial_state.copy_(grad_final_state)  # type: ignore[union-attr]
        return tuple(zeros)  # type: ignore[arg-type]


@torch.library.register_fake("gdn::backward")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_gradients_like(Call(*args[:_CALL])))


def _setup_forward(
    ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, list[Tensor]]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: _FIRST_OPTION[Call]], *output[2])
    ctx.options = tuple(inputs[_FIRST_OPTION[Call] : _CALL + 1])


def _differentiate_forward(
    ctx: Any, grad_o: Tensor | None, grad_final_state: Tensor | None, _: object
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # once: checkpointing recomputes at every access
    first = _FIRST_OPTION[Call]
    call, saved = Call(*tensors[:first], *ctx.options[:-1]), list(tensors[first:])
    if grad_o is None:
        grad_o = call.v.new_zeros(call.v.shape)
    if not call.output_final_state:
        grad_final_state = None
    gradients = torch.ops.gdn.backward(*call, ctx.options[-1], saved, grad_o, grad_final_state)
    needed = [
        gradient if x is not None and need else None
        for gradient, x, need in zip(
            gradients, call.differentiable, ctx.needs_input_grad, strict=False
        )
    ]
    return (*needed, *[None] * (_CALL + 2 - len(needed)))


def _refuse_double_backward(ctx: Any, *grads: object) -> NoReturn:
    raise RuntimeError(
        f"gdn.gated_delta_net has no double backward; use {_DEFINITION}, which is differentiable "
        "any number of times, or take gradients without create_graph=True"
    )


torch.library.register_autograd(
    "gdn::forward", _differentiate_forward, setup_context=_setup_forward
)
torch.library.register_autograd("gdn::backward", _refuse_double_backward)


@torch.library.register_vmap("gdn::forward")
def _refuse_vmap(*args: object) -> NoReturn:
    raise RuntimeError(
        "gdn.gated_delta_net does not support torch.func.vmap; fold the mapped dimension into B"
    )


def _decode(step: Step, request: str) -> Tensor:
    backend = dispatch.choose_decode(request, step)
    check_cu_seqlens(step)
    check_slots(step)
    if not _has_tokens(step):
        return step.v.new_empty(step.v.shape)
    with _surroundings(step.q):
        o = backend.decode(step)
    if not step.state.is_inference():
        torch.autograd.graph.increment_version(step.state)
    return o


@torch.library.impl("gdn::decode", "CompositeExplicitAutograd")
def _decode_op(*args: Any) -> Tensor:
    return _decode(Step(*args[:-1]), args[-1])


@torch.library.register_fake("gdn::decode")
def _decode_fake(*args: Any) -> Tensor:
    step = Step(*args[:-1])
    validate_step(step)
    dispatch.resolve(args[-1], describe_step(step))
    return step.v.new_empty(step.v.shape)
