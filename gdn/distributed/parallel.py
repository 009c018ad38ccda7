"""`cp=` of the op: `torch.ops.gdn.forward_parallel` and `.backward_parallel`, which exchange states
between ranks (`passes.py`), and their autograd.

Each pass is one operator. Ranks do different work, so graphs that show what is inside would differ
from rank to rank, and a compiler may then drop or reorder a collective on one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn import calls
from gdn.context_parallel import SCHEMA, ContextParallel, Placement
from gdn.ops import (
    GRADIENTS,
    gradients_like,
    refuse_double_backward,
    register_differentiable,
    schema,
)
from gdn.problem import Call
from gdn.shortcut import CALL_ARGUMENTS
from gdn.validation import check_types, refuse_tangents, refuse_transforms, validate

from . import choice, passes


def run(call: Call, cp: ContextParallel, request: str) -> tuple[Tensor, Tensor | None]:
    """o of this rank's tokens, and the final states of all sequences if call.output_final_state.

    The call's initial_state is that of all sequences. See `gdn.gated_delta_net`.
    """
    check_types(call)
    if not torch.compiler.is_compiling():
        refuse_transforms()
        refuse_tangents(call)
    _check(call, cp)
    at = cp.for_tokens(call.q)
    _check_state(call, at)
    save = calls.needs_grad(call)
    o, states, _ = torch.ops.gdn.forward_parallel(*call, request, save, *at)
    return o, states if call.output_final_state else None


def _check(call: Call, cp: object) -> None:
    """The errors that need no exchange."""
    if not isinstance(cp, ContextParallel):
        raise TypeError(f"cp must be a gdn.ContextParallel, got {type(cp).__name__}")
    for name in ("cu_seqlens", "cu_seqlens_cpu", "chunk_indices"):
        if getattr(call, name) is not None:
            raise ValueError(
                f"{name} must come without cp, got both; give the global cu_seqlens to "
                "gdn.ContextParallel"
            )
    validate(call._replace(initial_state=None))
    if call.q.shape[0] != 1:
        raise ValueError(
            f"q must have B = 1 with cp, got B = {call.q.shape[0]}; pack the sequences along T, "
            "and give their global cu_seqlens to gdn.ContextParallel"
        )


def _check_state(call: Call, at: Placement) -> None:
    """ValueError unless initial_state has a row for every sequence."""
    S = call.initial_state
    if S is None:
        return
    shape = (len(at.bounds) - 1, *call.state_shape[1:])
    if tuple(S.shape) != shape:
        form = "[N, HV, V, K]" if call.state_v_first else "[N, HV, K, V]"
        raise ValueError(
            f"initial_state must be {form} = {shape}, got {tuple(S.shape)}; with cp it has a row "
            "for every sequence of all ranks"
        )
    if not S.dtype.is_floating_point or S.device != call.q.device:
        raise ValueError(
            f"initial_state must be a floating-point tensor on {call.q.device}, got {S.dtype} on "
            f"{S.device}"
        )


torch.library.define(
    "gdn::forward_parallel",
    f"({schema(Call)}, bool save, {SCHEMA}) -> (Tensor o, Tensor final_state, Tensor[] saved)",
)
torch.library.define(
    "gdn::backward_parallel",
    f"({schema(Call)}, Tensor[] saved, Tensor grad_o, Tensor? grad_final_state, {SCHEMA}) -> "
    f"({GRADIENTS})",
)


def _choose(call: Call, at: Placement, request: str, needs_grad: bool) -> str:
    """The pinned request of the backend that runs the rank's part."""
    local = passes.cut(call._replace(initial_state=None), at, None)
    return choice.pin(request, local, needs_grad)


def _split_arguments(args: tuple[Any, ...]) -> tuple[Call, list[Any], Placement]:
    """An op's call, its own arguments, and its placement."""
    own = args[CALL_ARGUMENTS : -len(Placement._fields)]
    return Call(*args[:CALL_ARGUMENTS]), list(own), Placement.of(args)


@torch.library.impl("gdn::forward_parallel", "CompositeExplicitAutograd")
def _forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call, (request, save), at = _split_arguments(args)
    return passes.forward(call, at, _choose(call, at, request, save), save)


@torch.library.register_fake("gdn::forward_parallel")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call, (request, save), at = _split_arguments(args)
    shapes = passes.saved_like(call, at, [])
    request = _choose(call, at, request, save)
    local = passes.cut(call, at, shapes[0], request)
    o, _, saved = torch.ops.gdn.forward(*local, request, save)
    shape = passes.global_shape(call, at) if call.output_final_state else (0,)
    dtype = call.state_dtype if call.output_final_state else call.q.dtype
    return o, call.q.new_empty(shape, dtype=dtype), shapes + saved if save else []


@torch.library.impl("gdn::backward_parallel", "CompositeExplicitAutograd")
def _backward(*args: Any) -> tuple[Tensor, ...]:
    call, (request, saved, grad_o, grad_final_state), at = _split_arguments(args)
    found = passes.backward(call, at, request, saved, grad_o, grad_final_state)
    return tuple(call.q.new_empty(0) if x is None else x for x in found)


@torch.library.register_fake("gdn::backward_parallel")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(gradients_like(Call(*args[:CALL_ARGUMENTS])))


def _pin(request: str, call: Call, *arguments: Any) -> str:
    return _choose(call, Placement.of(arguments), request, True)


register_differentiable("forward_parallel", "backward_parallel", _pin)
torch.library.register_autograd("gdn::backward_parallel", refuse_double_backward)
