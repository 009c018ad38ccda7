"""float16 ends at 65504: norms of raw rows and states past it, where all outputs are in range."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gdn.backends.torch import TorchBackend
from support import require, run, train

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

RAW_ROWS = Case("raw-rows", T=100, H=1, HV=2, K=128, gates="weak", l2norm=True)
LARGE_STATES = Case("large-states", T=100, H=1, HV=2, gates="weak")
LARGE_VALUES = Case("large-values", T=100, H=1, HV=2, gates="model", initial_state=False)
CASES = [RAW_ROWS, LARGE_STATES, LARGE_VALUES]
CASES += [replace(case, name=f"channels-{case.name}", T=66, per_channel=True) for case in CASES]
TIMES: dict[str, dict[str, float]] = {
    "raw-rows": {"q": 10, "k": 1000, "v": 100},
    "large-states": {"initial_state": 5e4},
    "large-values": {"v": 1e4},
}


class Rounded(TorchBackend):
    """The torch backend with operands in float16, as it runs on a GPU."""

    name = "rounded"


def check_ranges(name: str, case: Case, device: str = "cpu", backward: bool = True) -> None:
    """S k of raw keys with norms of 2000 and values of 100 (the norm is fused), and elements of S
    up to 2e5, exceed float16, and values come close. o and the gradients of q, k and v do not."""
    case = replace(case, dtype=torch.float16)
    inputs = make_inputs(case)
    inputs |= {
        n: inputs[n] * factor for n, factor in TIMES[case.name.removeprefix("channels-")].items()
    }
    moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    require(name, moved)
    exact = with_gradients(inputs, torch.float64)
    outputs = run_definition(exact)
    expected = gradients(outputs, exact, make_output_gradients(case))
    expected |= {n: x.detach() for n, x in zip(("o", "final_state"), outputs, strict=True)}
    assert all(expected[n].abs().max() < 65504 for n in ("o", "q", "k", "v"))
    for n, x in run(name, case, train(name, moved) if backward else moved).items():
        assert relative_error(x, expected[n]) <= TOLERANCE[torch.float16], n


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("name", ["tilelang", "triton", "rounded"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_intermediates_stay_in_range(name: str, case: Case, device: str) -> None:
    gdn.register_backend(Rounded(torch.float16))
    check_ranges(name, case, device)
