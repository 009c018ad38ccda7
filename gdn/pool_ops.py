"""`torch.ops.gdn.decode` and `.prefill`, which update a pool of states in place: schemas and fake
kernels, the same for every backend. They have no gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gdn import dispatch
from gdn.ops import has_tokens, refuse_vmap, schema, surroundings
from gdn.problem import PoolCall, Prefill, Step, describe_pool_call, is_live
from gdn.shortcut import as_pool_call, needs_dispatcher
from gdn.validation import (
    check_bounds,
    check_memory,
    check_slots,
    refuse_negated,
    refuse_tangents,
    validate_pool_call,
)

torch.library.define(
    "gdn::decode",
    f"({schema(Step, state='Tensor(a!)', out='Tensor(b!)?', output_states='Tensor(c!)?')}) "
    "-> Tensor",
)
torch.library.define(
    "gdn::prefill",
    f"({schema(Prefill, state='Tensor(a!)', out='Tensor(b!)?', checkpoints='Tensor(c!)?')}) "
    "-> Tensor",
)


def run(given: PoolCall, request: str) -> Tensor:
    """Call the op: return o, which is `out` if that is given, and update the pool in place."""
    if forward_ad._current_level >= 0:
        refuse_tangents(given)
    kind, arguments = type(given), (*given.call, *given[1:])
    if torch.compiler.is_compiling() or needs_dispatcher(kind, arguments):
        refuse_negated(given)
        op = torch.ops.gdn.decode if kind is Step else torch.ops.gdn.prefill
        o: Tensor = op(*arguments, request)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            o = _run(given, request)
    return o if given.out is None else given.out


def _run(given: PoolCall, request: str) -> Tensor:
    plan, call = dispatch.choose_for_pool(request, given).plan, given.call
    check_bounds(call)
    check_slots(given)
    check_memory(given)
    with surroundings(call.q):
        if has_tokens(call):
            o = plan.decode(given) if isinstance(given, Step) else plan.prefill(given)
        else:
            o = call.v.new_zeros(call.v.shape) if given.out is None else given.out
            if isinstance(given, Prefill):
                _zero_fresh(given)
    for x in given.written:
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)
    return o


def _zero_fresh(prefill: Prefill) -> None:
    """Zero the slots of fresh sequences, where no sequence has a token."""
    slots, fresh = prefill.state_indices, prefill.fresh
    if fresh is not None and len(fresh):
        slots = torch.arange(len(fresh), device=fresh.device) if slots is None else slots.long()
        live = is_live(slots, prefill.state, prefill.null_index)
        prefill.state[slots[fresh & live]] = 0


def _new(given: PoolCall) -> Tensor:
    """An uninitialised o, or no elements where `out` takes its place."""
    return given.call.v.new_empty(given.call.v.shape if given.out is None else (0,))


def _implement(name: str, kind: type[PoolCall]) -> None:
    """Register an op's implementation, fake kernel and vmap rule."""

    def implementation(*args: Any) -> Tensor:
        given = as_pool_call(kind, *args[:-1])
        o = _run(given, args[-1])
        return o if given.out is None else _new(given)  # an op must not return an argument

    def fake(*args: Any) -> Tensor:
        given = as_pool_call(kind, *args[:-1])
        validate_pool_call(given)
        dispatch.resolve(args[-1], describe_pool_call(given))
        return _new(given)

    torch.library.impl(name, "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(name, fake)
    torch.library.register_vmap(name, refuse_vmap)


_implement("gdn::decode", Step)
_implement("gdn::prefill", Prefill)
