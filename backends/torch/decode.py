"""Decode in plain PyTorch: the definition's recurrence, token by token, on the states of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.definition import activate, recurrence
from gdn.problem import Call, PoolCall, Step, is_live


def _locate_tokens(call: Call) -> tuple[Tensor, Tensor]:
    """Positions of each sequence's tokens along B T, and which of them exist. Both are [N, T] for
    the T of the longest sequence."""
    B, T = call.q.shape[:2]
    device = call.q.device
    if call.cu_seqlens is None:
        positions = torch.arange(B * T, device=device).view(B, T)
        return positions, torch.ones_like(positions, dtype=torch.bool)
    bounds = call.cu_seqlens.long().clamp(0, T)  # on a GPU its values are not checked
    starts, lengths = bounds[:-1], bounds.diff()
    offsets = torch.arange(max(int(lengths.max()), 0) if len(lengths) else 0, device=device)
    exists = offsets < lengths[:, None]
    return torch.where(exists, starts[:, None] + offsets, 0), exists


def write_o(given: PoolCall, o: Tensor, live: Tensor) -> Tensor:
    """o with zeros for the sequences that are not live [N]; in `out`, if that is given, up to the
    end of the last sequence."""
    positions, exists = _locate_tokens(given.call)
    skipped = positions[exists & ~live[:, None]]
    o.flatten(0, 1)[skipped] = 0
    if given.out is None:
        return o
    end = o.shape[1]
    if given.call.cu_seqlens is not None:
        end = int(given.call.cu_seqlens[-1].clamp(0, end))
    given.out[:, :end] = o[:, :end]
    return given.out


def decode(step: Step) -> Tensor:
    """See `gdn.backend.Plan.decode`. Reads indices on the host."""
    call = step.call
    pool = step.state.mT if call.state_v_first else step.state  # [slots, HV, K, V]
    dtype, group = call.state_dtype, call.v.shape[2] // call.q.shape[2]
    q, k, g, beta = activate(call, dtype)
    q, k = (x.repeat_interleave(group, dim=2) for x in (call.scale * q, k))
    positions, exists = _locate_tokens(call)
    N, T = positions.shape
    slots = step.state_indices
    if slots is None:
        slots = torch.arange(N, device=positions.device)
    slots = slots.long().view(N, -1)  # [N, 1], or with a slot for each token
    in_pool = is_live(slots, step.state, step.null_index)
    column = slots.new_zeros(N)
    if step.num_accepted_tokens is not None:
        column = step.num_accepted_tokens.long() - int(not step.leading_column)
    column = column[:, None]  # [N, 1], where the state is read from
    column_exists = (column >= 0) & (column < slots.shape[1])
    column = torch.where(column_exists, column, 0)
    starts = (column_exists & in_pool.gather(1, column))[:, 0]
    (live,) = starts.nonzero(as_tuple=True)
    S = pool[slots.gather(1, column)[live, 0]].to(dtype)  # [live, HV, K, V]

    if step.output_states is not None and step.output_indices is not None:
        pool = step.output_states.mT if call.state_v_first else step.output_states
        slots = step.output_indices.long().view(N, -1)
        in_pool = is_live(slots, pool, step.null_index)
    o = call.v.new_zeros(call.v.shape)
    flat = [x.flatten(0, 1) for x in (q, k, call.v.to(dtype), g, beta)]
    for t in range(T):
        position, has_token = positions[live, t], exists[live, t]
        out, after = recurrence(*(x[position][:, None] for x in flat), S)  # type: ignore[call-arg]
        S = torch.where(has_token[:, None, None, None], after, S)
        o.flatten(0, 1)[position[has_token]] = out[has_token, 0].to(o.dtype)
        column_after = t + step.first_column
        if step.speculative and column_after < slots.shape[1]:
            stored = has_token & in_pool[live, column_after]
            pool[slots[live[stored], column_after]] = S[stored].to(pool.dtype)
    if not step.speculative and T:
        stored = exists[live, 0] & in_pool[live, 0]
        pool[slots[live[stored], 0]] = S[stored].to(pool.dtype)
    return write_o(step, o, starts)
