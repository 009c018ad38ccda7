"""Compiling before the first call: what a plan would launch, by stages that compile instead."""

from __future__ import annotations

import torch

from gdn.problem import Call, PoolCall, Prefill

from .launch import CompilingStage, compiles_ahead
from .plan import PrefillPlan
from .pool_plan import PoolPlan


class SequencePlan(PrefillPlan):
    """The plan of whole sequences, which can compile ahead."""

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        """See `gdn.backend.Plan.precompile`. Gradients also with one of the final state, if it is
        returned."""
        if not compiles_ahead():
            return False
        assert isinstance(call, Call)
        plan = _Compiling(call)
        o, final, saved = plan.forward(call, save=backward)
        if backward:
            for grad_final in (None,) if final is None else (None, torch.empty_like(final)):
                plan.backward(call, saved, torch.empty_like(o), grad_final)
        return True


class SlotPlan(PoolPlan):
    """The plan of prefill on a pool, which can compile ahead."""

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        """See `gdn.backend.Plan.precompile`."""
        if not compiles_ahead():
            return False
        assert isinstance(call, Prefill)
        _CompilingOnPool(call).prefill(call)
        return True


class _Compiling(PrefillPlan):
    stage_type = CompilingStage


class _CompilingOnPool(PoolPlan):
    stage_type = CompilingStage
