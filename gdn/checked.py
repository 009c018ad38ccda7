"""Checks of what a backend returns. Shapes and dtypes follow from what a plan was made for, so the
first result of each of its methods is checked, and later ones cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdn.backend import Backend, Forward, Gradients, Plan
from gdn.exchange import Exchange, ExchangingPlan
from gdn.problem import Call, PoolCall, Prefill, Step


class CheckedPlan(ExchangingPlan):
    """A plan of a backend. RuntimeError if the first result of a method is not of the contract's
    shapes and dtypes."""

    def __init__(self, backend: Backend, plan: Plan) -> None:
        self.backend, self.plan = backend, plan

    def forward(self, call: Call, save: bool) -> Forward:
        result = self._checked_forward(self.plan.forward(call, save), call, save)
        self.forward = self.plan.forward  # type: ignore[method-assign]
        return result

    def forward_part(self, call: Call, save: bool, exchange: Exchange) -> Forward:
        run = self._exchanging().forward_part
        result = self._checked_forward(run(call, save, exchange), call, save)
        self.forward_part = run  # type: ignore[method-assign]
        return result

    def backward_part(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, exchange: Exchange
    ) -> Gradients:
        run = self._exchanging().backward_part
        result = self._checked_backward(run(call, saved, grad_o, exchange), call)
        self.backward_part = run  # type: ignore[method-assign]
        return result

    def _exchanging(self) -> ExchangingPlan:
        if not isinstance(self.plan, ExchangingPlan):
            raise self._fault("an ExchangingPlan, since it exchanges", type(self.plan).__name__)
        return self.plan

    def _checked_forward(self, result: Forward, call: Call, save: bool) -> Forward:
        self._count("Forward", result, 3)
        o, final_state, saved = result
        self._compare("o", o, call.v.shape, call.v.dtype, call)
        if call.output_final_state:
            self._compare("final_state", final_state, call.state_shape, call.state_dtype, call)
        like = self.backend.saved_like(call) if save else []
        if like is not None:
            self._count("saved, as saved_like has it,", saved, len(like))
            for n, (x, expected) in enumerate(zip(saved, like, strict=True)):
                self._compare(f"saved[{n}]", x, expected.shape, expected.dtype, call)
        return result

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        result = self.plan.backward(call, saved, grad_o, grad_final_state)
        self._checked_backward(result, call)
        self.backward = self.plan.backward  # type: ignore[method-assign]
        return result

    def _checked_backward(self, result: Gradients, call: Call) -> Gradients:
        self._count("Gradients", result, len(Gradients._fields))
        for name, found, x in zip(Gradients._fields, result, call.differentiable, strict=True):
            if x is not None:
                self._compare(f"the gradient of {name}", found, x.shape, x.dtype, call)
        return result

    def decode(self, step: Step) -> Tensor:
        o = self._checked(self.plan.decode(step), step)
        self.decode = self.plan.decode  # type: ignore[method-assign]
        return o

    def prefill(self, prefill: Prefill) -> Tensor:
        o = self._checked(self.plan.prefill(prefill), prefill)
        self.prefill = self.plan.prefill  # type: ignore[method-assign]
        return o

    def _checked(self, o: Tensor, given: PoolCall) -> Tensor:
        call = given.call
        self._compare("o", o, call.v.shape, call.v.dtype, call)
        if given.out is not None and o is not given.out:
            raise self._fault("o in `out`", "another tensor")
        return o

    def _count(self, name: str, found: Any, expected: int) -> None:
        if not isinstance(found, tuple | list) or len(found) != expected:
            got = f"{len(found)}" if isinstance(found, tuple | list) else type(found).__name__
            raise self._fault(f"{name} of {expected} items", got)

    def _compare(
        self, name: str, x: object, shape: Sequence[int], dtype: torch.dtype, call: Call
    ) -> None:
        got, device = type(x).__name__, call.q.device
        if isinstance(x, Tensor):
            if x.shape == torch.Size(shape) and x.dtype == dtype and x.device == device:
                return
            got = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise self._fault(f"{name} as {dtype} {list(shape)} on {device}", got)

    def _fault(self, wanted: str, got: str) -> RuntimeError:
        return RuntimeError(
            f"backend {self.backend.name!r} must return {wanted}, got {got}; the fault is the "
            "backend's, not the call's"
        )
