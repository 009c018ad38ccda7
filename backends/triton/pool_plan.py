"""Prefill on a pool of states: the launches of `plan.py`, whose scan reads and writes slots."""

from __future__ import annotations

import triton
from torch import Tensor

from gdn.problem import Prefill

from .plan import NO_POOL, PrefillPlan
from .strides import read_in_place


class PoolPlan(PrefillPlan):
    """The launches for all such calls of one kind: same shapes, strides, dtypes, device and
    options."""

    def __init__(self, given: Prefill) -> None:
        call, strides = read_in_place(given.call)
        super().__init__(call, strides)
        offsets, indices, columns = given.checkpoint_offsets, given.state_indices, 0
        if offsets is not None:
            columns = offsets.shape[1] if offsets.dim() == 2 else 1
        self.pool_flags = {
            "POOL": True,
            "POOL_V_FIRST": call.state_v_first,
            "CHECKPOINTS": triton.next_power_of_2(columns) if columns else 0,
        }
        self.clears_tail = call.cu_seqlens is not None and given.out is None
        self.pool_sizes = (
            given.null_index,
            given.state.shape[0],
            given.state.stride(0),
            0 if indices is None else indices.stride(0),
            columns,
        )
        self.prefill_stages = self.bind_forward(call, save=False)

    def prefill(self, prefill: Prefill) -> Tensor:
        """See `gdn.backend.Plan.prefill`."""
        call, _ = read_in_place(prefill.call)
        fresh, offsets, indices = (
            None if x is None else x.contiguous()
            for x in (prefill.fresh, prefill.checkpoint_offsets, prefill.checkpoint_indices)
        )
        pool = (
            prefill.state, prefill.state_indices, fresh, offsets, indices, prefill.checkpoints
        )  # fmt: skip
        factors, matrices, *piece_buffers = (new() for new in self.new_saved)
        o = self.new_o() if prefill.out is None else prefill.out
        prepare, scans = self.prefill_stages
        gates, cu_seqlens = (call.g, call.beta, call.A_log, call.dt_bias), call.cu_seqlens
        decayed = self.prepare(prepare, call, gates, factors, matrices)
        inputs = (call.q, call.k, call.v, factors, matrices, *decayed)
        if piece_buffers:
            transfers, starts = piece_buffers
            scans[0]((*inputs, None, None, transfers, *[None] * 4, cu_seqlens, *NO_POOL))
            scans[1]((transfers, transfers, None, starts, None, cu_seqlens, *pool[:3]))
            scans[2]((*inputs, starts, o, *[None] * 5, cu_seqlens, *pool))
        else:
            scans[0]((*inputs, None, o, *[None] * 5, cu_seqlens, *pool))
        return o
