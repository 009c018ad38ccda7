"""Forward in one kernel (`forward/fused.py`): against the definition in the emulator and on a GPU,
and through ptxas."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gdn
from gdn.problem import Call
from gdn.testing import CASES as SHARED
from gdn.testing import CLOSE_KEYS, Case, make_inputs, relative_error

pytest.importorskip("tilelang")
emulated = pytest.importorskip("test_tilelang_emulated")
compiled = pytest.importorskip("test_tilelang")

from gdn.backends.tilelang.forward import fused_plan  # noqa: E402
from gdn.backends.tilelang.forward import plan as forward  # noqa: E402
from support import assert_close, compile_together, require, run, truth  # noqa: E402
from test_agreement import SHORT_NAMES  # noqa: E402
from test_close_keys import check_against_rounding  # noqa: E402
from test_float16_ranges import LARGE_STATES, LARGE_VALUES, RAW_ROWS, check_ranges  # noqa: E402
from test_tilelang_emulated import WORLDS, check, folder, world  # noqa: E402, F401
from uniform_registers import run_tool  # noqa: E402

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


ON_GPU = [
    replace(case, K=case.K if case.K in (64, 128) else 128, V=128, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for case in SHARED
    if dtype == torch.bfloat16 or case.name in SHORT_NAMES
]


def prefer_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes the one kernel that it can, and scans whole sequences."""
    monkeypatch.setattr(fused_plan, "MIN_SHARE", 0.0)
    monkeypatch.setattr(fused_plan, "one_kernel_length", lambda call: None)


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_one_kernel(monkeypatch)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that takes `prepare` fails."""
    monkeypatch.setattr(forward, "prepare", None)


@WORLDS
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(
    world: Callable[..., None],  # noqa: F811
    name: str,
    late: bool,
) -> None:
    world(late)
    check(CASES[name], make_inputs(CASES[name]))


@pytest.mark.parametrize("name", ["cosine-1-beta-1", "cosine-1-beta-2", "long-equal-keys"])
def test_close_keys_cost_no_more_than_rounding(
    world: Callable[..., None],  # noqa: F811
    name: str,
) -> None:
    world(late=True)
    (case,) = (case for case in CLOSE_KEYS if case.name == name)
    case = replace(case, V=128, dtype=torch.bfloat16)
    check_against_rounding("emulated", case, make_inputs(case))


RANGES = pytest.mark.parametrize(
    "case",
    [replace(case, V=128) for case in (RAW_ROWS, LARGE_STATES, LARGE_VALUES)],
    ids=lambda case: case.name,
)


@RANGES
def test_float16_ranges(world: Callable[..., None], case: Case) -> None:  # noqa: F811
    world(late=True)
    check_ranges("emulated", case, backward=False)


def test_negative_strengths_stay_in_range(world: Callable[..., None]) -> None:  # noqa: F811
    """With equal keys A grows to 1e7, although no entry of M exceeds 1."""
    world(late=False)
    case = replace(CASES["dense"], B=1, T=64, gates="none", cosine=1.0, beta=-0.3, l2norm=True)
    inputs, expected = make_inputs(case), truth(case)
    for name, value in run("emulated", case, inputs).items():
        assert relative_error(value, expected[name]) < 0.05


@pytest.mark.parametrize("slow", [0, 3, 4, 8, 12, 13, 14, 15])
def test_a_warp_may_be_slow(world: Callable[..., None], slow: int) -> None:  # noqa: F811
    """Two warps of the intra-chunk warpgroup, one of each consumer warpgroup, the loading, the
    storing, the gate and the norm warp."""
    world(late=True, slow=slow)
    case = replace(CASES["dense"], B=1, T=270, fused=True)
    check(case, make_inputs(case))


@pytest.mark.parametrize(
    ("waits", "slow"),
    [
        ("intra_chunk_ready", 0),
        ("keys_ready", 0),
        ("ready", 12),
        ("v_ready", 12),
        ("o_ready", 4),
        ("v_free", 13),
        ("tokens_ready", 14),
        ("norms_ready", 15),
    ],
)
def test_a_missing_wait_shows(
    world: Callable[..., None],  # noqa: F811
    waits: str,
    slow: int,
) -> None:
    case = replace(CASES["dense"], B=1, T=270, fused=True)
    fail_without(world, waits, slow, case)


def fail_without(
    world: Callable[..., None],  # noqa: F811
    waits: str,
    slow: int,
    case: Case,
) -> None:
    """AssertionError unless a case fails without the waits for a barrier, where the warp that is
    waited for is slow."""
    removed = []

    def edit(source: str) -> str:
        edited, count = re.subn(r"\b" + waits + r"\[.*?\]\.wait\(.*?\);", "", source)
        removed.append(count)
        return edited

    world(True, edit, slow=slow)
    with pytest.raises((AssertionError, RuntimeError)):
        check(case, make_inputs(case))
    assert any(removed)


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_serialises_no_product_and_spills_outside_of_loops(name: str, tmp_path: Path) -> None:
    """Spilled are addresses: of the state, before and after the scan, and of the storing warp's
    last chunk. In packed calls also what finds a task and a chunk, in the loading and the gate
    warp. The intra-chunk warpgroup does not wait for the number of a thread."""
    plan, _ = compiled.plan_of(CASES[name])
    (kernel,) = compile_together(*plan.jobs(save=False))
    compiled.assert_compiles_well(kernel, tmp_path, spilled=16 if name == "dense" else 48)
    pytest.importorskip("triton")
    code = run_tool("cuobjdump", "-sass", tmp_path / "kernel.out")
    after_barriers = code[: code.rindex("HMMA")].split("BAR.SYNC.DEFER_BLOCKING 0x4,")
    merges = "".join(after_barriers[-3:])  # in one part and in two
    assert merges.count("HMMA") > 40
    assert "SR_TID.X" not in merges, "threadIdx is read again: see `gdn_kept_thread`"


def check_twice_on_a_gpu(case: Case, inputs: dict[str, Any]) -> None:
    """A call agrees with the definition, and a second one with the first, bit by bit."""
    require("tilelang", inputs)
    expected = truth(case)
    got = run("tilelang", case, inputs)
    for name, value in got.items():
        assert_close(name, value, expected[name], case.dtype)
    for name, value in run("tilelang", case, inputs).items():
        assert torch.equal(value, got[name])


@pytest.mark.gpu
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: f"{case.name}-{str(case.dtype)[6:]}")
def test_agrees_with_the_definition_on_a_gpu(case: Case) -> None:
    check_twice_on_a_gpu(case, make_inputs(case, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CLOSE_KEYS, ids=lambda case: case.name)
def test_close_keys_on_a_gpu(clean_registry: None, case: Case, dtype: torch.dtype) -> None:
    case = replace(case, V=128, dtype=dtype)
    inputs = make_inputs(case, "cuda")
    require("tilelang", inputs)
    check_against_rounding("tilelang", case, inputs)


@pytest.mark.gpu
@RANGES
def test_float16_ranges_on_a_gpu(case: Case) -> None:
    check_ranges("tilelang", case, "cuda", backward=False)


@pytest.mark.gpu
def test_more_scans_than_sms() -> None:
    """Several thread blocks an SM, one after the other, and lengths from 1 token to 40 chunks."""
    lengths = tuple(1 + 37 * n % 2500 for n in range(40))
    case = Case(
        "many", lengths=lengths, H=4, HV=16, K=128, V=128, dtype=torch.bfloat16, fused=True
    )  # fmt: skip
    inputs = make_inputs(case, "cuda")
    expected = gdn.gated_delta_net(**inputs, backend="torch")
    o, state = gdn.gated_delta_net(**inputs, backend="tilelang")
    assert_close("o", o, expected.o, case.dtype)
    assert_close("final_state", state, expected.final_state, case.dtype)


@pytest.mark.parametrize(
    ("B", "HV", "chosen"),
    [
        (4, 32, True),
        (4, 16, False),  # 64 scans leave half of 132 SMs idle
        (1, 144, False),  # the last 12 scans would have the GPU for themselves
        (4, 48, True),
        (0, 32, False),
    ],
)
def test_is_chosen_where_scans_fill_the_gpu(
    monkeypatch: pytest.MonkeyPatch, B: int, HV: int, chosen: bool
) -> None:
    """Tensors on the meta device count as on a GPU with 132 SMs."""
    monkeypatch.undo()
    x = torch.empty((B, 8192, HV, 128), device="meta")
    call = Call(x, x, x, x[..., 0], x[..., 0])
    assert fused_plan.fills_gpu(call) is chosen
