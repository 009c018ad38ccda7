"""What a backend does not claim it refuses, with every reason, and touches nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import reasons_against

import gdn
from gdn.testing import CASES, Case, make_inputs, with_gradients
from gdn.testing.decode import STEPS, StepCase, make_step

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_calls(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    inputs = with_gradients(make_inputs(replace(case, dtype=dtype), device))
    reasons = reasons_against(backend, inputs)
    if not reasons:
        pytest.skip("claimed, and tested elsewhere")
    with pytest.raises(gdn.BackendUnsupportedError) as refusal:
        gdn.gated_delta_net(**inputs, backend=backend)
    assert refusal.value.reasons == {backend: list(reasons)}
    assert all(reason in str(refusal.value) for reason in reasons)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_steps(backend: str, device: str, case: StepCase, dtype: torch.dtype) -> None:
    inputs = make_step(replace(case, dtype=dtype), device)
    reasons = reasons_against(backend, inputs)
    if not reasons:
        pytest.skip("claimed, and tested elsewhere")
    before = inputs["state"].clone()
    with pytest.raises(gdn.BackendUnsupportedError) as refusal:
        gdn.gated_delta_net_decode(**inputs, backend=backend)
    assert all(reason in str(refusal.value) for reason in reasons)
    assert torch.equal(inputs["state"], before)
