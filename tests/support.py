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


def able(backend: str, inputs: dict[str, Any]) -> bool:
    """Whether the backend claims this call; if not, check that it refuses with its reasons."""
    verdicts = {v.name: v for v in gdn.explain(**inputs, backend=backend).verdicts}
    reasons = verdicts[backend].reasons
    if reasons:
        with pytest.raises(gdn.BackendUnsupportedError) as refusal:
            gdn.gated_delta_net(**inputs, backend=backend)
        assert all(reason in str(refusal.value) for reason in reasons)
    return not reasons


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
