"""Decode in plain PyTorch: the definition's recurrence, token by token, on the rows of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.definition import activate, recurrence
from gdn.problem import Call, Step


def _tokens(call: Call) -> tuple[Tensor, Tensor]:
    """Where the tokens of each sequence lie along [B T], and which of these places are real: [N, T]
    both, T that of the longest."""
    B, T = call.q.shape[:2]
    device = call.q.device
    if call.cu_seqlens is None:
        place = torch.arange(B * T, device=device).view(B, T)
        return place, torch.ones_like(place, dtype=torch.bool)
    starts, lengths = call.cu_seqlens[:-1].long(), call.cu_seqlens.diff()
    offsets = torch.arange(int(lengths.max()) if len(lengths) else 0, device=device)
    real = offsets < lengths[:, None]
    return torch.where(real, starts[:, None] + offsets, 0), real


def decode(step: Step) -> Tensor:
    """See `gdn.backend.Plan.decode`. Reads indices on the host."""
    call = step.call
    pool = step.state.mT if call.state_v_first else step.state  # [slots, HV, K, V]
    dtype, group = call.state_dtype, call.v.shape[2] // call.q.shape[2]
    q, k, g, beta = activate(call, dtype)
    q, k = (x.repeat_interleave(group, dim=2) for x in (call.scale * q, k))
    place, real = _tokens(call)
    N, T = place.shape
    table = step.state_indices
    if table is None:
        table = torch.arange(N, device=place.device)
    table = table.long().view(N, -1)
    inside = (table != step.null_index) & (table >= 0) & (table < pool.shape[0])
    column = table.new_zeros(N) if step.num_accepted_tokens is None else step.num_accepted_tokens
    column = column.long()[:, None]
    known = (column >= 0) & (column < table.shape[1])
    column = torch.where(known, column, 0)
    (live,) = (known & inside.gather(1, column))[:, 0].nonzero(as_tuple=True)

    S = pool[table.gather(1, column)[live, 0]].to(dtype)
    o = call.v.new_zeros(call.v.shape)
    flat = [x.flatten(0, 1) for x in (q, k, call.v.to(dtype), g, beta)]
    for t in range(T):
        at, there = place[live, t], real[live, t]
        out, after = recurrence(*(x[at][:, None] for x in flat), S)  # type: ignore[call-arg]
        S = torch.where(there[:, None, None, None], after, S)
        o.flatten(0, 1)[at[there]] = out[there, 0].to(o.dtype)
        if step.speculative and t + 1 < table.shape[1]:
            kept = there & inside[live, t + 1]
            pool[table[live[kept], t + 1]] = S[kept].to(pool.dtype)
    if not step.speculative:
        pool[table[live, 0]] = S.to(pool.dtype)
    return o
