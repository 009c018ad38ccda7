"""Decode and prefill on a pool of states. fla knows no pool: states are gathered into a batch
before its function and scattered after it, without a device sync of the adapter's own."""

from __future__ import annotations

import torch
from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
from fla.ops.kda import fused_recurrent_kda
from torch import Tensor

from gdn.backend import Plan
from gdn.problem import Call, PoolCall, Prefill, Step, is_live

from .prefill import options_of


def _bounded(call: Call) -> Call:
    """The call with cu_seqlens within 0..T, since their values are not checked on a GPU."""
    if call.cu_seqlens is None:
        return call
    return call._replace(cu_seqlens=call.cu_seqlens.clamp(0, call.q.shape[1]).cummax(0).values)


def _lengths(call: Call) -> Tensor:
    """The number of tokens of each sequence."""
    if call.cu_seqlens is None:
        return torch.full((call.sequences,), call.q.shape[1], device=call.q.device)
    return call.cu_seqlens.diff()


def _scatter(pool: Tensor, slots: Tensor, stored: Tensor, new: Tensor) -> None:
    """Write the stored rows of new to their slots. A row that is not stored writes what a stored
    one writes, or if there is none puts slot 0 back."""
    some = stored.to(torch.uint8).argmax()
    slots = torch.where(stored, slots, 0)
    slots = torch.where(stored, slots, slots.index_select(0, some[None]))  # never read back
    rows = torch.where(stored, torch.arange(len(stored), device=stored.device), some)
    pool[slots] = torch.where(stored.any(), new[rows].to(pool.dtype), pool[slots])


def _finish(given: PoolCall, o: Tensor, live: Tensor) -> Tensor:
    """o, or `out`, with zeros for sequences that are not live. Past the end of the last sequence o
    has zeros, and `out` is left alone."""
    B, T = given.call.q.shape[:2]
    bounds, out = given.call.cu_seqlens, given.out
    if bounds is None:
        shown, beyond = live.view(B, 1, 1, 1), live.new_zeros(1, 1, 1, 1)
    else:
        owner = torch.searchsorted(
            bounds[1:].contiguous(), torch.arange(T, device=live.device), right=True
        )
        beyond = (owner == len(live)).view(1, T, 1, 1)
        nobody = live.new_zeros(1)  # owns the tokens past the last sequence
        shown = torch.cat([live, nobody])[owner].view(1, T, 1, 1)
    o = o.masked_fill(~shown, 0)
    return o if out is None else out.copy_(torch.where(beyond, out, o))


def _start(given: PoolCall) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, which of them are live, and the states there."""
    pool, slots = given.state, given.state_indices
    if slots is None:
        slots = torch.arange(len(pool), device=pool.device)
        return slots, is_live(slots, pool, given.null_index), pool
    live = is_live(slots, pool, given.null_index)
    return slots, live, pool[torch.where(live, slots, 0)]


def decode(step: Step) -> Tensor:
    """See `gdn.backend.Plan.decode`."""
    step = step._replace(call=_bounded(step.call))
    call = step.call
    options = options_of(call)
    if call.per_channel:
        options["lower_bound"] = call.gate_lower_bound
    slots, live, states = _start(step)
    options |= {"initial_state": states.contiguous(), "output_final_state": True}
    recurrence = fused_recurrent_kda if call.per_channel else fused_recurrent_gated_delta_rule
    o: Tensor
    after: Tensor
    o, after = recurrence(**options)
    if step.output_states is not None and step.output_indices is not None:
        stored = live & is_live(step.output_indices, step.output_states, step.null_index)
        stored &= _lengths(call) > 0
        _scatter(step.output_states, step.output_indices, stored, after)
    elif step.state_indices is None and not 0 <= step.null_index < len(step.state):
        step.state.copy_(after)
        if call.cu_seqlens is None and step.out is None:
            return o
    else:
        _scatter(step.state, slots, live, after)
    return _finish(step, o, live)


def prefill(plan: Plan, prefill: Prefill) -> Tensor:
    """See `gdn.backend.Plan.prefill`. plan: one that runs the same call without a pool."""
    prefill = prefill._replace(call=_bounded(prefill.call))
    call, fresh = prefill.call, prefill.fresh
    slots, live, states = _start(prefill)
    stored, states = live & (_lengths(call) > 0), states.float()
    if fresh is not None:
        stored |= live & fresh
        states = states.masked_fill(fresh.view(-1, 1, 1, 1), 0)
    o, after, _ = plan.forward(call._replace(initial_state=states, output_final_state=True), False)
    assert after is not None  # asked for
    _scatter(prefill.state, slots, stored, after)
    return _finish(prefill, o, live)
