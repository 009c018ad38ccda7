"""Decode through fla's fused recurrence, which knows no pool: states are gathered into a batch
before it and scattered after it, without a device sync."""

from __future__ import annotations

from typing import Any

import torch
from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
from fla.ops.kda import fused_recurrent_kda
from torch import Tensor

from gdn.problem import Step


def _live_tokens(step: Step, live: Tensor) -> Tensor:
    """[B, T, 1, 1]: whether each token's sequence is live."""
    B, T = step.call.q.shape[:2]
    if step.call.cu_seqlens is None:
        return live.view(B, 1, 1, 1)
    tokens = torch.arange(T, device=live.device)
    owner = torch.searchsorted(step.call.cu_seqlens[1:].contiguous(), tokens, right=True)
    nobody = live.new_zeros(1)  # owns the tokens past the last sequence
    return torch.cat([live, nobody])[owner].view(1, T, 1, 1)


def decode(step: Step) -> Tensor:
    """See `gdn.backend.Plan.decode`."""
    call, pool, slots = step.call, step.state, step.state_indices
    options: dict[str, Any] = call._asdict()
    bound = options.pop("gate_lower_bound")
    if call.per_channel:
        options["lower_bound"] = bound
    live = None
    if slots is None:
        states = pool
    else:
        live = (slots != step.null_index) & (slots >= 0) & (slots < pool.shape[0])
        slots = torch.where(live, slots, 0)
        states = pool[slots]
    options |= {"initial_state": states.contiguous(), "output_final_state": True}
    o: Tensor
    after: Tensor
    recurrence = fused_recurrent_kda if call.per_channel else fused_recurrent_gated_delta_rule
    o, after = recurrence(**options)
    if slots is None or live is None:
        pool.copy_(after)
        if call.cu_seqlens is None:
            return o
        return o.masked_fill(~_live_tokens(step, o.new_ones(len(pool), dtype=torch.bool)), 0)
    # a skipped row writes what a live one writes, or if there is none puts slot 0 back
    some = live.to(torch.uint8).argmax()
    slots = torch.where(live, slots, slots.index_select(0, some[None]))  # never read back
    rows = torch.where(live, torch.arange(len(live), device=live.device), some)
    new = after[rows].to(pool.dtype)
    pool[slots] = torch.where(live.any(), new, states[rows])
    return o.masked_fill(~_live_tokens(step, live), 0)
