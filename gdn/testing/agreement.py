"""Agreement before timing: a case's tensors, its reference results in float64, and the errors of a
backend against them.

The definition computes token by token, so it is the reference only for a case cut to
`CHECKED_TOKENS`. At the full size the reference is the torch backend in float64, which must itself
match the definition on the short case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gdn
from gdn.testing import (
    TOLERANCE,
    Case,
    gradients,
    make_inputs,
    make_output_gradients,
    relative_error,
    run_definition,
    with_gradients,
)
from gdn.testing.decode import StepCase, copy_pool, make_step, run_step_definition

CHECKED_TOKENS = 200
"""Three full chunks and a partial one."""
OUTPUTS = ("o", "final_state")
HEADS_AT = dict.fromkeys(("q", "k", "v", "g", "beta", "o"), 2)
HEADS_AT |= {"initial_state": 1, "final_state": 1, "A_log": 0, "dt_bias": 0}
"""The dimension of the heads, by tensor name."""
TOKEN_HEADS = 2**20
"""Tokens times value heads that the torch backend computes at once in float64."""

Named = dict[str, Tensor]


class Inputs(NamedTuple):
    """A case's keyword arguments, without and with gradients on, and the gradients of its
    outputs."""

    plain: dict[str, Any]
    leaves: dict[str, Any]
    output_gradients: tuple[Tensor, Tensor]

    def forward(self, backend: str, leaves: bool = False) -> gdn.GDNOutput:
        """Call the op."""
        return gdn.gated_delta_net(**(self.leaves if leaves else self.plain), backend=backend)

    def backward(self, outputs: gdn.GDNOutput, again: bool = False) -> Named:
        """Gradients by name from the outputs of a forward on the leaves."""
        given = self.output_gradients
        return gradients(outputs, self.leaves, given, again)  # type: ignore[arg-type]

    def run(self, backend: str, which: str) -> Named:
        """Outputs by name, and unless `which` is "fwd" every gradient."""
        outputs = self.forward(backend, leaves=which != "fwd")
        found = self.backward(outputs) if which != "fwd" else {}
        return {name: x.detach() for name, x in outputs._asdict().items()} | found


def make(case: Case, device: torch.device) -> Inputs:
    """Draw a case's tensors on the device."""
    plain = make_inputs(case, device, draw=device)
    return Inputs(plain, with_gradients(plain), make_output_gradients(case, device, draw=device))


def shortened(case: Case) -> Case:
    """The case cut to about CHECKED_TOKENS tokens."""
    if case.lengths is None:
        return replace(case, T=min(case.T, CHECKED_TOKENS), B=1)
    share = max(1, CHECKED_TOKENS // max(1, len(case.lengths)))
    return replace(case, lengths=tuple(min(length, share) for length in case.lengths))


def in_float64(inputs: Inputs, which: str) -> Named:
    """Outputs and gradients by the torch backend in float64. Large cases are computed a few heads
    at a time, since all heads would take tens of gigabytes."""
    B, T, H = inputs.plain["q"].shape[:3]
    group = inputs.plain["v"].shape[2] // H
    heads = max(1, min(H, TOKEN_HEADS // max(1, B * T * group)))
    parts = [_in_float64(_of_heads(inputs, h, h + heads), which) for h in range(0, H, heads)]
    return {
        name: torch.cat([part[name] for part in parts], dim=HEADS_AT[name]) for name in parts[0]
    }


def _in_float64(inputs: Inputs, which: str) -> Named:
    plain = with_gradients(inputs.plain, torch.float64)
    if which == "fwd":
        with torch.no_grad():
            return inputs._replace(plain=plain).run("torch", "fwd")
    return inputs._replace(leaves=plain).run("torch", which)


def _of_heads(inputs: Inputs, first: int, end: int) -> Inputs:
    """The inputs of q/k heads first to end - 1."""
    H, HV = (inputs.plain[name].shape[2] for name in "qv")

    def part(name: str, x: Any) -> Any:
        if name not in HEADS_AT or x is None:
            return x
        times = 1 if name in ("q", "k") else HV // H
        return x.narrow(HEADS_AT[name], first * times, (min(end, H) - first) * times)

    plain = {name: part(name, x) for name, x in inputs.plain.items()}
    o, state = (part(name, x) for name, x in zip(OUTPUTS, inputs.output_gradients, strict=True))
    return Inputs(plain, plain, (o, state))


def by_definition(inputs: Inputs) -> Named:
    """Outputs and gradients by the definition in float64."""
    leaves = with_gradients(inputs.plain, torch.float64)
    o, state = run_definition(leaves)
    found = gradients((o, state), leaves, inputs.output_gradients)
    return {"o": o.detach(), "final_state": state.detach()} | found


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs, reference results and tolerance of a case, cut short and at its full size."""

    short: Inputs
    full: Inputs
    results: tuple[Named, Named]
    tolerance: float

    def errors(self, backend: str, which: str) -> tuple[dict[str, float], dict[str, float]]:
        """Relative errors by tensor name, of the short case and of the full one."""
        found = []
        for inputs, expected in zip((self.short, self.full), self.results, strict=True):
            got = inputs.run(backend, which)
            found.append({name: relative_error(x, expected[name]) for name, x in got.items()})
        return found[0], found[1]

    def failure(self, errors: dict[str, float]) -> str | None:
        """The errors above the tolerance as a message, or None."""
        over = [f"{name} {x:.1e}" for name, x in errors.items() if not x <= self.tolerance]
        return f"relative error above {self.tolerance:g}: {', '.join(over)}" if over else None


def make_reference(case: Case, device: torch.device, which: str) -> Reference:
    """Reference results for a case's outputs and, unless `which` is "fwd", gradients. RuntimeError
    if the torch backend in float64 disagrees with the definition."""
    short, full = make(shortened(case), device), make(case, device)
    definition, chunked = by_definition(short), in_float64(short, "fwd+bwd")
    for name, x in chunked.items():
        error = relative_error(x, definition[name])
        if not error <= TOLERANCE[torch.float64]:
            raise RuntimeError(
                f"{name} of the torch backend in float64 must match the definition, got a relative "
                f"error of {error:.1e}; fix the torch backend first"
            )
    return Reference(short, full, (definition, in_float64(full, which)), TOLERANCE[case.dtype])


class StepInputs(NamedTuple):
    """A decode step's keyword arguments, and o and the states after it by the definition in
    float64."""

    kwargs: dict[str, Any]
    o: Tensor
    states: Tensor

    def errors(self, backend: str) -> dict[str, float]:
        """Relative errors of o and of the states that the step names."""
        state = copy_pool(self.kwargs["state"])
        o = gdn.gated_delta_net_decode(**self.kwargs | {"state": state}, backend=backend)
        states = _named(state, self.kwargs)
        return {"o": relative_error(o, self.o), "state": relative_error(states, self.states)}


def _named(state: Tensor, kwargs: dict[str, Any]) -> Tensor:
    slots = kwargs.get("state_indices")
    return state if slots is None else state[slots.long()]


def make_step_inputs(case: StepCase, device: torch.device) -> StepInputs:
    """Draw a step's tensors on the device and compute its reference. No sequence may be skipped."""
    kwargs = make_step(case, device, draw=device)
    o, state = run_step_definition(kwargs)
    return StepInputs(kwargs, o, _named(state, kwargs))
