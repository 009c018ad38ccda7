"""Forward in one kernel (`forward/fused.py`), without a GPU: in the emulator against the
definition, and through ptxas."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gdn.testing import Case, make_inputs

pytest.importorskip("tilelang")
emulated = pytest.importorskip("test_tilelang_emulated")
compiled = pytest.importorskip("test_tilelang")

from gdn.backends.tilelang.forward import plan as forward  # noqa: E402
from test_tilelang_emulated import WORLDS, check, folder, world  # noqa: E402, F401

CASES = {
    case.name: case
    for case in (
        Case("dense", T=150, B=2, H=1, K=128, V=128, dtype=torch.bfloat16, state_v_first=True),
        Case(
            "packed", lengths=(70, 0, 1, 64, 129), H=1, HV=2, K=128, V=128, dtype=torch.bfloat16,
            fused=True, allow_neg_eigval=True,
        ),
        Case(
            "narrow-keys", T=200, H=1, HV=2, K=64, V=128, dtype=torch.float16, fused=True,
            gates="model", initial_state=False,
        ),
    )
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes the one kernel that it can."""
    monkeypatch.setattr(forward, "FUSED_SHARE", 0.0)
    monkeypatch.setattr(forward, "piece_length", lambda call, rows: None)


@WORLDS
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    late: bool,
) -> None:
    world(late)
    monkeypatch.setattr(forward, "prepare", None)  # not used
    check(CASES[name], make_inputs(CASES[name]))


@pytest.mark.parametrize("slow", [0, 4, 8, 11, 12, 13, 14])
def test_a_warp_may_be_slow(world: Callable[..., None], slow: int) -> None:  # noqa: F811
    """Warps of both consumer warpgroups, two of the coupling warpgroup, the loading, the storing
    and the gate warp."""
    world(late=True, slow=slow)
    case = replace(CASES["dense"], B=1, T=270)
    check(case, make_inputs(case))


@pytest.mark.parametrize("waits", ["coupled[(chunk % 3)]", "tokens_ready[(chunk % 3)]"])
def test_a_missing_wait_shows(world: Callable[..., None], waits: str) -> None:  # noqa: F811
    def edit(source: str) -> str:
        assert f"{waits}.wait(" in source
        return re.sub(re.escape(waits) + r"\.wait\(.*?\);", "", source)

    world(True, edit)
    with pytest.raises((AssertionError, RuntimeError)):
        check(CASES["dense"], make_inputs(CASES["dense"]))


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_serialises_no_product_and_spills_outside_of_loops(name: str, tmp_path: Path) -> None:
    """Spilled are addresses of the state, before and after the scan; those of [K, V] are many."""
    plan, _ = compiled.plan_of(CASES[name])
    (kernel,) = plan.kernels(save=False)
    said = compiled.verdict(kernel, tmp_path)
    compiled.assert_registers_suffice(kernel.get_kernel_source(), said)
    assert max(map(int, re.findall(r"(\d+) bytes spill", said))) <= (16 if name == "dense" else 720)
    assert "serialized" not in said, said
