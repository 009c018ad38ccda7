"""The adapter's plan: fla's own functions, nothing worked out ahead.

fla leaves what lies past the last packed sequence uninitialised. So it gets the tokens before that,
and the rest of its results is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gdn.backend import Forward, Gradients, Plan
from gdn.problem import Call, Prefill, Step
from gdn.reentry import calling_out

from . import channels, pool, prefill


class FlaPlan(Plan):
    """The same for every call. fla's public functions come back to gdn where it is registered with
    fla (`gdn.integrations.fla`), unless they see that gdn calls."""

    def forward(self, call: Call, save: bool) -> Forward:
        T, end, module = call.q.shape[1], prefill.last_token(call), _module(call)
        if end == T:
            with calling_out():
                found: Forward = module.forward(call) if save else module.forward_only(call)
            return found
        if end == 0:
            final = call.q.new_zeros(call.state_shape, dtype=call.state_dtype)
            if call.initial_state is not None:
                final.copy_(call.initial_state)
            saved = [x.zero_() for x in module.saved_like(call)] if save else []
            return Forward(call.v.new_zeros(call.v.shape), final, saved)
        o, final_state, saved = self.forward(_first_tokens(call, end), save)
        return Forward(_pad(o, T), final_state, [_pad(x, T) for x in saved])

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        T, end, module = call.q.shape[1], prefill.last_token(call), _module(call)
        found: Gradients
        if end == T:
            found = module.backward(call, saved, grad_o, grad_final_state)
            return found
        if end == 0:
            zeros = (None if x is None else torch.zeros_like(x) for x in call.differentiable)
            found = Gradients(*zeros)  # type: ignore[arg-type]
            if found.initial_state is not None and grad_final_state is not None:
                found.initial_state.copy_(grad_final_state)
            return found
        saved, grad_o = [x[:, :end] for x in saved], grad_o[:, :end]
        found = self.backward(_first_tokens(call, end), saved, grad_o, grad_final_state)
        padded = {name: _pad(getattr(found, name), T) for name in ("q", "k", "v", "g", "beta")}
        return found._replace(**padded)

    def decode(self, step: Step) -> Tensor:
        with calling_out():
            return pool.decode(step)

    def prefill(self, prefill: Prefill) -> Tensor:
        return pool.prefill(self, prefill)


def _module(call: Call) -> Any:
    return channels if call.per_channel else prefill


def _first_tokens(call: Call, end: int) -> Call:
    return call._replace(**{n: getattr(call, n)[:, :end] for n in ("q", "k", "v", "g", "beta")})


def _pad(x: Any, T: int) -> Tensor:
    """x [B, end, ...] with zeros up to token T."""
    return pad(x, (0, 0) * (x.dim() - 2) + (0, T - x.shape[1]))
