"""What several test modules share: running a case, its cached truth, and the tolerances."""

from __future__ import annotations

import functools
from typing import Any

import pytest
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


def capabilities_of(backend: str) -> gdn.Capabilities:
    """What a backend claims."""
    return next(info.capabilities for info in gdn.list_backends() if info.name == backend)


def reasons_against(backend: str, inputs: dict[str, Any]) -> tuple[str, ...]:
    """Why the backend does not claim this call, or with state= this step; empty if it does."""
    verdicts = {v.name: v for v in gdn.explain(**inputs, backend=backend).verdicts}
    return verdicts[backend].reasons


def require(backend: str, inputs: dict[str, Any]) -> None:
    """Skip the test unless the backend claims this call; `test_refusals` holds it to the
    refusal."""
    if reasons := reasons_against(backend, inputs):
        pytest.skip("; ".join(reasons))


def run(backend: str, case: Case, inputs: dict[str, Any], device: str) -> dict[str, Tensor]:
    """o, final_state and, if the inputs require them, every gradient, by name."""
    o, final_state = gdn.gated_delta_net(**inputs, backend=backend)
    grads = {}
    if inputs["q"].requires_grad:
        grads = gradients((o, final_state), inputs, make_output_gradients(case, device))
    return {"o": o.detach(), "final_state": final_state.detach()} | grads


@functools.cache
def truth(case: Case) -> dict[str, Tensor]:
    """The same by the definition, in float64 on the CPU, from inputs rounded to the case's
    dtype."""
    inputs = with_gradients(make_inputs(case), torch.float64)
    outputs = run_definition(inputs)
    grads = gradients(outputs, inputs, make_output_gradients(case))
    return {"o": outputs[0].detach(), "final_state": outputs[1].detach()} | grads


def assert_close(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Elementwise and in relative RMS, with the tolerances of dtype."""
    torch.testing.assert_close(
        got.double().cpu(),
        expected.double().cpu(),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
        msg=lambda text: f"{name}: {text}",
    )
    error = relative_error(got, expected)
    assert error <= TOLERANCE[dtype], f"{name}: relative RMS error {error:.2e}"
