"""Head sizes that TileLang lays out in blocks. With plain PyTorch in place of kernels nothing
changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gdn.backends.tilelang import BACKEND
from gdn.backends.tilelang.arguments import token_ready
from gdn.backends.tilelang.blocked_plan import BlockedPlan
from gdn.backends.tilelang.head_blocks import HeadBlocks, choose_blocks
from gdn.backends.torch import BACKEND as PLAIN

from gdn.problem import Call, describe
from gdn.testing import Case, make_inputs, make_output_gradients

CASES = (
    Case("K=96, V=192", T=70, B=2, H=1, HV=2, K=96, V=192),
    Case("V=256", lengths=(5, 66), K=128, V=256, state_v_first=True, fused=True),
    Case("K=96, V=96", T=65, K=96, V=96, initial_state=False, fused=True),
    Case("channels", T=65, H=1, K=96, V=256, fused=True, per_channel=True),
    Case("channels, V first", T=65, K=128, V=192, per_channel=True, state_v_first=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_change_nothing(case: Case) -> None:
    """Outputs and all gradients, in float64."""
    case = replace(case, dtype=torch.float64)
    call = Call(**{"scale": 0.5} | make_inputs(case))
    layout = choose_blocks(case.K, case.V)
    assert layout is not None
    inside = layout.of(call)
    assert {inside.q.shape[3], inside.v.shape[3]} <= {64, 128}
    plans = PLAIN.plan(call), BlockedPlan(PLAIN.plan(inside), layout)
    into = make_output_gradients(case)
    found = []
    for plan in plans:
        o, final, saved = plan.forward(call, True)
        gradients = plan.backward(call, saved, *into)
        found.append([x for x in (o, final, *gradients) if x is not None])
    assert len(found[0]) == len(found[1])
    for expected, got in zip(*found, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_layout_of_head_sizes() -> None:
    assert choose_blocks(64, 128) is None
    assert choose_blocks(96, 192) == HeadBlocks(96, 192, 128, 64, 3)
    assert choose_blocks(128, 256) == HeadBlocks(128, 256, 128, 128, 2)
    assert choose_blocks(96, 96) == HeadBlocks(96, 96, 128, 128, 1)
    problem = describe(Call(**{"scale": 1.0} | make_inputs(CASES[0])), needs_grad=False)
    assert BACKEND.path(problem) == "TileLang, K padded to 128, V in 3 blocks of 64"
    assert BACKEND.path(replace(problem, K=128, V=96)) == "TileLang, V padded to 128"
    assert BACKEND.path(replace(problem, pool=torch.float32)) == "TileLang"


def test_gates_whose_offsets_exceed_32_bits_are_copied() -> None:
    far = torch.empty(0, device="meta").as_strided((1, 2**18, 4), (0, 2**13, 1))
    assert not token_ready(far).stride(1) > 4
    near = far[:, : 2**18 - 1]
    assert token_ready(near) is near
