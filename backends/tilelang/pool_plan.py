"""Prefill on a pool of states: forward's kernels, whose scans read and write slots. Where the one
kernel computes a pack of short sequences, decode's computes those of one token."""

from __future__ import annotations

from torch import Tensor

from gdn.backend import Plan
from gdn.problem import Call, PoolCall, Prefill, Step

from .arguments import dtype_name
from .decode.plan import DecodePlan
from .forward.fused_plan import leaves_single_tokens
from .forward.plan import ForwardPass
from .kernels import Job
from .launch import launchers
from .tile.pool_kind import PoolKind


def pool_kind(given: Prefill) -> PoolKind:
    """What kernels must know of a prefill's pool and tables."""
    offsets = given.checkpoint_offsets
    asked = offsets is not None and offsets.numel() > 0
    return PoolKind(
        dtype=dtype_name(given.state),
        indices=dtype_name(given.state_indices),
        fresh=given.fresh is not None,
        offsets=dtype_name(offsets) if asked else "",
        places=dtype_name(given.checkpoint_indices) if asked else "",
        apart=not asked and leaves_single_tokens(given.call),
    )


def as_step(given: Prefill) -> Step:
    """The step of the sequences of one token."""
    call, state, indices = given.call, given.state, given.state_indices
    return Step(call, state, indices, out=given.out, null_index=given.null_index)


class PoolPlan(Plan):
    """What all such calls of one kind (shapes, strides, dtypes, device, options) have in common."""

    def __init__(self, given: Prefill) -> None:
        self.kind = pool_kind(given)
        self.forward_pass = ForwardPass(given.call, self.kind, clears_tail=given.out is None)
        self.steps: DecodePlan | None = None
        if self.kind.apart:
            self.steps = DecodePlan(as_step(given), single=True, starts=self.kind.fresh)

    def jobs(self, call: Call | PoolCall, backward: bool) -> list[Job]:
        """The kernels that such calls need."""
        steps = [] if self.steps is None else self.steps.jobs(call, backward)
        return [*steps, *self.forward_pass.all_jobs(save=False)]

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        """See `gdn.backend.Plan.precompile`. Also for other numbers of sequences, as decode."""
        launchers(self.all_jobs())
        return True

    def all_jobs(self) -> list[Job]:
        """`jobs` for any number of sequences."""
        steps = [] if self.steps is None else self.steps.all_jobs()
        return [*steps, *self.forward_pass.all_jobs(save=False)]

    def prefill(self, prefill: Prefill) -> Tensor:
        """See `gdn.backend.Plan.prefill`."""
        o = self.forward_pass.new_o() if prefill.out is None else prefill.out
        if o.data_ptr() % 16:  # TMA cannot store there
            o = o.clone()
        offsets = places = buffer = None
        if self.kind.offsets:
            offsets, places = (
                None if x is None else x.contiguous().view(x.shape[0], -1)
                for x in (prefill.checkpoint_offsets, prefill.checkpoint_indices)
            )
            buffer = prefill.state
            if prefill.checkpoints is not None:
                buffer = prefill.checkpoints.view(-1, *prefill.state.shape[1:])
        fresh = None if prefill.fresh is None else prefill.fresh.contiguous()
        tables = (prefill.state_indices, fresh, offsets, places, buffer, prefill.null_index)
        self.forward_pass.run(prefill.call, False, prefill.state, o, prefill.state, tables)
        if self.steps is not None:
            self.steps.decode(as_step(prefill)._replace(out=o), fresh)
        return o if prefill.out is None or o is prefill.out else prefill.out.copy_(o)
