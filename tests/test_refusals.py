"""A backend refuses each call that it does not claim, with every reason, and changes no state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn.testing import CASES, Case, make_inputs, with_gradients
from gdn.testing.check import assert_refused, reasons_against
from gdn.testing.decode import STEPS, StepCase, make_step
from gdn.testing.prefill import PREFILLS, PrefillCase, make_prefill

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("case", [*CASES, *STEPS, *PREFILLS], ids=lambda case: case.name)
def test_refusals(backend: str, device: str, case: Case) -> None:
    refused = 0
    for dtype in DTYPES:
        one = replace(case, dtype=dtype)
        prefill = isinstance(one, PrefillCase)
        if isinstance(one, StepCase):
            inputs = make_step(one, device)
        elif isinstance(one, PrefillCase):
            inputs = make_prefill(one, device)
        else:
            inputs = with_gradients(make_inputs(one, device))
        if reasons := reasons_against(backend, inputs, prefill):
            assert_refused(backend, inputs, reasons, prefill)
            refused += 1
    if not refused:
        pytest.skip("claimed in every dtype, and tested by other modules")
