"""Prefill on a pool, whose sequences of one token decode's kernel computes: against the definition,
and through ptxas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gdn.problem import Call
from gdn.testing.prefill import PrefillCase, as_prefill, make_prefill

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

import test_prefill
import test_tilelang as compiled
from gdn.backends.tilelang.forward import fused_plan
from gdn.backends.tilelang.pool_plan import PoolPlan
from support import compile_together, poisoned_memory  # noqa: F401
from test_tilelang_emulated import WORLDS, folder, world  # noqa: F401
from test_tilelang_pool import EVERYTHING, check, one_kernel  # noqa: F401

MIXED = replace(
    EVERYTHING, name="mixed", lengths=(1, 1, 70, 0, 1, 1, 1, 33, 1), H=1, HV=2, K=128, V=128,
    checkpoints="none", columns=0,
)  # fmt: skip
"""Decode takes the sequences of one token, some of which start from zero or have no slot."""
MIXED_CASES = (
    MIXED,
    replace(MIXED, name="mixed-out", dtype=torch.float16, pool=torch.float32, fused=False,
            state_v_first=False, own=True, fresh=False, out=True),
    replace(MIXED, name="all-single", lengths=(1,) * 9, padding=7, pool=torch.float32),
)  # fmt: skip


@pytest.mark.usefixtures("poisoned_memory", "one_kernel")
@WORLDS
@pytest.mark.parametrize("case", MIXED_CASES, ids=lambda case: case.name)
def test_single_tokens_by_decode(
    world: Callable[..., None],  # noqa: F811
    case: PrefillCase,
    late: bool,
) -> None:
    world(late)
    plan = PoolPlan(as_prefill(make_prefill(case)))
    names = [kernel.name for kernel, _ in plan.forward_pass.jobs(save=False)]
    assert plan.steps is not None
    assert names == ["list_sequences", "fused_forward"]
    check(case)


@pytest.mark.parametrize(
    ("N", "T", "HV", "expected"),
    [
        (260, 8448, 32, True),
        (5, 319, 16, True),
        (5, 320, 16, False),  # 64 tokens a sequence
        (4, 100, 16, False),  # 64 scans leave most SMs idle
        (64, 9600, 32, False),
    ],
)
def test_when_single_tokens_are_left_to_decode(N: int, T: int, HV: int, expected: bool) -> None:
    q = torch.empty(1, T, HV, 128, dtype=torch.bfloat16, device="meta")
    gates = torch.empty(1, T, HV, device="meta")
    bounds = torch.empty(N + 1, dtype=torch.int32, device="meta")
    call = Call(q, q, q, gates, gates, scale=1.0, cu_seqlens=bounds)
    assert fused_plan.leaves_single_tokens(call) == expected
    assert not fused_plan.leaves_single_tokens(call._replace(batch_invariant=True))


@pytest.mark.usefixtures("one_kernel")
def test_neither_spills_in_loops_nor_serialises(tmp_path: Path) -> None:
    plan = PoolPlan(as_prefill(make_prefill(MIXED)))
    assert plan.steps is not None
    for kernel in compile_together(*plan.forward_pass.jobs(save=False), *plan.steps.all_jobs()):
        compiled.assert_compiles_well(kernel, tmp_path, spilled=40)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory", "one_kernel")
@pytest.mark.parametrize("case", MIXED_CASES, ids=lambda case: case.name)
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, case: PrefillCase) -> None:
    """Thread blocks draw several sequences each."""
    monkeypatch.setattr(fused_plan, "sm_count", lambda device: 2)
    case = replace(case, H=4, HV=8)
    test_prefill.test_agrees_with_the_definition("tilelang", "cuda", case, case.dtype)
