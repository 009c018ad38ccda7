"""Batch-invariant calls reach a backend with tensors that lie alike whatever the batch is: the
order of sums follows strides and alignment, and a sequence cut out of a pack has others."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch import contiguous_format as CONTIGUOUS

from gdn.backend import Backend, Forward, Gradients, Plan
from gdn.problem import DIFFERENTIABLE, Call, PoolCall, Prefill, Step

BYTES = 16
"""What addresses are multiples of: the widest load of a GPU's thread."""


def make_plan(backend: Backend, given: Call | PoolCall) -> Plan:
    """The backend's plan of a call, for aligned tensors if the call is batch-invariant."""
    if not (given if isinstance(given, Call) else given.call).batch_invariant:
        return backend.plan(given)
    return AlignedPlan(backend.plan(align(given)))


def align(given: Any) -> Any:
    """A call, on a pool or not, with contiguous, aligned tensors; pools, tables and cu_seqlens
    stay."""
    if not isinstance(given, Call):
        return given._replace(call=align(given.call))
    tensors = zip(DIFFERENTIABLE, given.differentiable, strict=True)
    return given._replace(**{name: _aligned(x) for name, x in tensors})


def _aligned(x: Tensor | None) -> Any:
    """x, or a copy of x if its address or a stride is another than a new tensor's."""
    if x is None:
        return None
    size, strides = 1, []
    for n in reversed(x.shape):
        strides.append(size)
        size *= max(n, 1)
    if x.stride() == tuple(reversed(strides)) and not x.data_ptr() % BYTES:
        return x
    return x.clone(memory_format=CONTIGUOUS)


class AlignedPlan(Plan):
    """A plan that gets aligned tensors."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def forward(self, call: Call, save: bool) -> Forward:
        return self.plan.forward(align(call), save)

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        grads = _aligned(grad_o), _aligned(grad_final_state)
        return self.plan.backward(align(call), saved, *grads)

    def decode(self, step: Step) -> Tensor:
        return self.plan.decode(align(step))

    def prefill(self, prefill: Prefill) -> Tensor:
        return self.plan.prefill(align(prefill))

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        return self.plan.precompile(align(call), backward)
