"""The plan of one kind of call: a `ForwardPass`, and a `BackwardPass` built when it is needed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.exchange import Exchange, ExchangingPlan
from gdn.problem import Call, PoolCall

from .forward.plan import ForwardPass
from .kernels import Job
from .launch import compile_all, launchers


class PrefillPlan(ExchangingPlan):
    """What all calls of one kind (shapes, dtypes, device, options) have in common."""

    def __init__(self, call: Call) -> None:
        self.forward_pass = ForwardPass(call)
        self.backward_pass: Any = None
        self.gathered = False

    def forward(self, call: Call, save: bool) -> Forward:
        """See `gdn.backend.Plan.forward`. A first training step compiles all of its kernels here:
        those of backward need not wait for those of forward."""
        if save and not self.gathered:
            self.gathered = True
            compile_all(self.forward_pass.all_jobs(save=True), self.jobs(call, backward=True))
        return self.forward_pass.forward(call, save)

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        """See `gdn.backend.Plan.backward`."""
        gradients: Gradients
        gradients = self._backward_pass(call).backward(call, saved, grad_o, grad_final_state)
        return gradients

    def forward_part(self, call: Call, save: bool, exchange: Exchange) -> Forward:
        """See `gdn.exchange.ExchangingPlan.forward_part`."""
        return self.forward_pass.forward(call, save, exchange)

    def backward_part(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, exchange: Exchange
    ) -> Gradients:
        """See `gdn.exchange.ExchangingPlan.backward_part`."""
        gradients: Gradients
        gradients = self._backward_pass(call).backward(call, saved, grad_o, None, exchange)
        return gradients

    def jobs(self, call: Call, backward: bool) -> list[Job]:
        """The kernels that such calls need; with backward also those of the gradients."""
        jobs = self.forward_pass.all_jobs(save=backward)
        if backward and call.context_parallel:  # from the states and gradients of the exchange
            jobs += self._backward_pass(call).jobs(initial=True, final=True)
        elif backward:
            initial = call.initial_state is not None
            for final in sorted({False, call.output_final_state}):
                jobs += self._backward_pass(call).jobs(initial, final)
        return jobs

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        """See `gdn.backend.Plan.precompile`."""
        assert isinstance(call, Call)
        launchers(self.jobs(call, backward))
        return True

    def _backward_pass(self, call: Call) -> Any:
        if self.backward_pass is None:
            # imported here: a forward call need not read the modules of backward
            from .backward.plan import BackwardPass

            self.backward_pass = BackwardPass(call)
        return self.backward_pass
