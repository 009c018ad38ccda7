"""A decay per channel on TileLang's kernels, and a lower bound of the gate, in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gdn.testing.decode import StepCase

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

import test_decode
from test_tilelang_emulated import folder, world  # noqa: F401

STEP = StepCase("channels", B=4, HV=4, per_channel=True)
STEPS = (
    STEP,
    replace(STEP, name="v-first", K=128, V=128, T=2, fused=True, state_v_first=True),
    replace(
        STEP, name="packed", B=1, lengths=(2, 0, 1, 4), H=1, HV=3, fused=True, tail=3,
        gate_lower_bound=-5.0,
    ),
    replace(
        STEP, name="speculative", T=2, slots="each", pool=torch.bfloat16, padding=8, fused=True,
        gate_lower_bound=-5.0, leading=False,
    ),
    replace(
        STEP, name="elsewhere", pool=torch.float16, padding=3, output="each", T=3, out=True,
        gates="resets", state_v_first=True,
    ),
    StepCase("head-lower-bound", B=2, HV=4, fused=True, gate_lower_bound=-5.0, gates="strong"),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_decode_agrees_with_the_definition(
    world: Callable[..., None],  # noqa: F811
    case: StepCase,
    dtype: torch.dtype,
) -> None:
    world(late=False)
    test_decode.test_agrees_with_the_definition("emulated", "cpu", case, dtype)
