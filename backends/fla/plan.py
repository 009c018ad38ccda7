"""The adapter's plan: fla's own functions, nothing worked out ahead."""

from __future__ import annotations

from torch import Tensor

from gdn.backend import Forward, Gradients, Plan
from gdn.problem import Call, Step
from gdn.reentry import calling_out

from . import channels, decode, prefill


class FlaPlan(Plan):
    """The same for every call. fla's public functions come back to gdn where it is registered with
    fla (`gdn.integrations.fla`), unless they see that gdn calls."""

    def forward(self, call: Call, save: bool) -> Forward:
        with calling_out():
            if call.per_channel:
                return channels.forward(call) if save else channels.forward_only(call)
            return prefill.forward(call) if save else prefill.forward_only(call)

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        backward = channels.backward if call.per_channel else prefill.backward
        return backward(call, saved, grad_o, grad_final_state)

    def decode(self, step: Step) -> Tensor:
        with calling_out():
            return decode.decode(step)
