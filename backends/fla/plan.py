"""The adapter's plan: fla's own functions, nothing worked out ahead."""

from __future__ import annotations

from torch import Tensor

from gdn.backend import Forward, Gradients, Plan
from gdn.problem import Call, Step

from . import channels, decode, prefill


class FlaPlan(Plan):
    """The same for every call."""

    def forward(self, call: Call, save: bool) -> Forward:
        if call.per_channel:
            return channels.forward(call) if save else channels.forward_only(call)
        return prefill.forward(call) if save else prefill.forward_only(call)

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        backward = channels.backward if call.per_channel else prefill.backward
        return backward(call, saved, grad_o, grad_final_state)

    def decode(self, step: Step) -> Tensor:
        return decode.decode(step)
