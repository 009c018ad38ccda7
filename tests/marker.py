"""A backend for tests of dispatch and plug-ins: it fills o with its own number."""

from __future__ import annotations

from typing import Any

import torch

import gdn
from gdn.backend import Backend, Capabilities, Forward, Plan
from gdn.problem import FLAGS, Call, PoolCall
from gdn.testing import Case, make_inputs

INPUTS = make_inputs(Case("dispatch", T=3, K=4, V=4))


class Marker(Backend):
    """Fills o with its own number, so that a test sees which backend ran."""

    name = "marker"
    summary = "for tests"
    capabilities = Capabilities(dtypes=(torch.float32,))

    def __init__(self, name: str = "marker", number: float = 1.0, **capabilities: Any) -> None:
        self.name = name  # type: ignore[misc]
        self.number = number
        able = {"dtypes": (torch.float32,), "initial_state": True, "flags": frozenset(FLAGS)}
        self.capabilities = Capabilities(**able | capabilities)  # type: ignore[misc]

    def plan(self, call: Call | PoolCall) -> Plan:
        return MarkerPlan(self.number)


class MarkerPlan(Plan):
    def __init__(self, number: float) -> None:
        self.number = number

    def forward(self, call: Call, save: bool) -> Forward:
        state = call.q.new_zeros(call.state_shape) if call.output_final_state else None
        return Forward(torch.full_like(call.v, self.number), state, [])


def which_ran(**kwargs: Any) -> float:
    """The number of the backend that ran the call."""
    return gdn.gated_delta_net(**INPUTS, **kwargs).o.flatten()[0].item()
