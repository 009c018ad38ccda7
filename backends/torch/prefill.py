"""Prefill on a pool of states: `chunk_loop.py` between reads and writes of slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gdn.problem import Call, Prefill, is_live

from .chunk_loop import forward
from .decode import write_o


def within_tokens(call: Call) -> Call:
    """The call with cu_seqlens that never leave 0..T and never descend, on the CPU. On a GPU its
    values are not checked."""
    if call.cu_seqlens is None:
        return call
    bounds = call.cu_seqlens.cpu().long().clamp(0, call.q.shape[1]).cummax(0).values
    return call._replace(cu_seqlens=bounds.to(call.q.device), cu_seqlens_cpu=bounds)


def _lengths(call: Call) -> Tensor:
    """The number of tokens of each sequence."""
    if call.cu_seqlens is None:
        return torch.full((call.sequences,), call.q.shape[1], device=call.q.device)
    return call.cu_seqlens.diff()


def _store_checkpoints(
    prefill: Prefill, live: Tensor, lengths: Tensor
) -> Callable[[int, Callable[[], Tensor]], None] | None:
    """What `forward` calls after every chunk."""
    offsets, table, buffer = prefill[4:7]
    if offsets is None:
        return None
    wanted = offsets.long().view(len(live), -1)  # [N, C]
    wanted = torch.where(live[:, None] & (wanted <= lengths[:, None]), wanted, 0)
    slots = None
    if table is not None:
        slots = table.long().view(len(live), -1)
        wanted = torch.where(is_live(slots, prefill.state, prefill.null_index), wanted, 0)

    def visit(done: int, states: Callable[[], Tensor]) -> None:
        rows, columns = (wanted == done).nonzero(as_tuple=True)
        if not len(rows):
            return
        found = states()[rows].to(prefill.state.dtype)
        if slots is not None:
            prefill.state[slots[rows, columns]] = found
        elif buffer is not None:
            buffer.view(*wanted.shape, *found.shape[1:])[rows, columns] = found

    return visit


def run_prefill(
    prefill: Prefill, operand_dtype: torch.dtype | None, rounds_inverse: bool
) -> Tensor:
    """See `gdn.backend.Plan.prefill`. Reads indices on the host. cu_seqlens is `within_tokens`."""
    call, pool, fresh = prefill.call, prefill.state, prefill.fresh
    N, lengths = call.sequences, _lengths(call)
    slots = prefill.state_indices
    slots = torch.arange(N, device=pool.device) if slots is None else slots.long()
    live = is_live(slots, prefill.state, prefill.null_index)
    zeroed = torch.zeros_like(live) if fresh is None else fresh
    initial = pool.new_zeros(call.state_shape, dtype=call.state_dtype)
    read, write = live & ~zeroed & (lengths > 0), live & (zeroed | (lengths > 0))
    initial[read] = pool[slots[read]].to(initial.dtype)
    visit = _store_checkpoints(prefill, live, lengths)
    call = call._replace(initial_state=initial, output_final_state=True)
    o, final_state, _ = forward(call, False, operand_dtype, rounds_inverse, visit)
    assert final_state is not None  # asked for
    pool[slots[write]] = final_state[write].to(pool.dtype)
    return write_o(prefill, o, live)
