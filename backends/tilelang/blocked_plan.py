"""The plan of calls whose heads are laid out in blocks (`head_blocks.py`)."""

from __future__ import annotations

from torch import Tensor

from gdn.backend import Forward, Gradients, Plan
from gdn.problem import Call, PoolCall

from .head_blocks import HeadBlocks
from .kernels import Job
from .plan import PrefillPlan


class BlockedPlan(Plan):
    """`inner` is the plan of calls laid out so."""

    def __init__(self, inner: PrefillPlan, layout: HeadBlocks) -> None:
        self.inner, self.layout = inner, layout

    def forward(self, call: Call, save: bool) -> Forward:
        """See `gdn.backend.Plan.forward`."""
        o, final, saved = self.inner.forward(self.layout.of(call), save)
        final = self.layout.joined_states(final, call.state_v_first)
        return Forward(self.layout.joined(o), final, saved)

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        """See `gdn.backend.Plan.backward`."""
        layout, v_first = self.layout, call.state_v_first
        dS = layout.block_states(grad_final_state, v_first)
        found = self.inner.backward(layout.of(call), saved, layout.to_blocks(grad_o), dS)
        A_log, dt_bias = found.A_log, found.dt_bias
        return Gradients(
            q=found.q[..., : layout.K].contiguous(),
            k=found.k[..., : layout.K].contiguous(),
            v=layout.joined(found.v),
            g=layout.summed(found.g, call.g, 2),
            beta=layout.summed(found.beta, call.beta, 2),
            initial_state=layout.joined_states(found.initial_state, v_first),
            A_log=None if A_log is None else layout.summed(A_log, call.A_log, 0),
            dt_bias=None if dt_bias is None else layout.summed(dt_bias, call.dt_bias, 0),
        )

    def jobs(self, call: Call, backward: bool) -> list[Job]:
        """See `PrefillPlan.jobs`."""
        return self.inner.jobs(self.layout.of(call), backward)

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        """See `gdn.backend.Plan.precompile`."""
        assert isinstance(call, Call)
        return self.inner.precompile(self.layout.of(call), backward)
