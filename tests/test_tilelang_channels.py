"""A decay per channel on TileLang's kernels, and a lower bound of the gate, in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gdn
from gdn.testing import CLOSE_KEYS, Case, make_inputs, run_definition
from gdn.testing.decode import StepCase

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

import test_decode
import test_distributed
from gdn.backends.tilelang import BACKEND, piece_lengths
from support import assert_close, compile_together, poisoned_memory, run, truth  # noqa: F401
from test_close_keys import check_against_rounding
from test_float16_ranges import CASES as RANGES
from test_float16_ranges import TIMES, check_ranges
from test_padded_packs import padded
from test_tilelang import assert_compiles_well, plan_of
from test_tilelang_emulated import check, folder, forward, pieces, world  # noqa: F401

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
    replace(STEP, name="head-dims-96-192", B=3, H=1, HV=2, K=96, V=192, fused=True),
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


DENSE = Case("dense", T=130, H=1, HV=2, per_channel=True, dtype=torch.bfloat16)
FUSED = replace(DENSE, T=70, K=128, V=128, fused=True, state_v_first=True)
FORWARD = (
    FUSED,
    replace(DENSE, name="packed", lengths=(33, 0, 64, 5), T=0, HV=3, fused=True, gates="model"),
    replace(FUSED, name="bounded", fused=True, gates="strong", gate_lower_bound=-5.0),
    replace(DENSE, name="resets", gates="resets", initial_state=False, K=128),
    replace(DENSE, name="steep", T=70, gates="steep", fused=True, V=128),
    replace(DENSE, name="no-decay", T=70, gates="none", cosine=0.9, allow_neg_eigval=True),
)


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.name)
def test_forward(
    world: Callable[..., None],  # noqa: F811
    case: Case,
    dtype: torch.dtype,
    late: bool,
) -> None:
    world(late)
    case = replace(case, dtype=dtype)
    check(case, make_inputs(case))


@pytest.mark.parametrize("way", ["two-warpgroups", "segments", "pieces", "halved"])
def test_forward_as_plans_cut_it(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    world(late=True)
    case = replace(FUSED, T=200, B=2, fused=False, gates="weak")
    if way == "two-warpgroups":
        monkeypatch.setattr(forward, "choose_warpgroups", lambda V, scans, device: 2)
    elif way == "segments":
        monkeypatch.setattr(forward, "MIN_SEGMENT_CHUNKS", 2)
    else:
        for module in (pieces, piece_lengths):
            monkeypatch.setattr(module, "piece_length", lambda call, rows: 128)
    if way == "halved":
        monkeypatch.setattr(pieces, "MIN_HALF_PIECE_CHUNKS", 1)
    check(case, make_inputs(case))


def with_other_gates(case: Case) -> list[dict[str, Any]]:
    """Inputs with g and beta in bfloat16; with a lower bound without A_log, and raw gates of -inf,
    1e4 and 1e38."""
    plain = make_inputs(case)
    plain |= {name: plain[name].bfloat16() for name in ("g", "beta")}
    bounded = make_inputs(replace(case, fused=True, gate_lower_bound=-5.0)) | {"A_log": None}
    bounded["g"][:, 10], bounded["g"][:, 20], bounded["g"][:, 30] = -torch.inf, 1e4, 1e38
    return [plain, bounded]


def test_other_gates(world: Callable[..., None]) -> None:  # noqa: F811
    world(late=False)
    case = replace(DENSE, K=128, T=65)
    for given in with_other_gates(case):
        got, expected = gdn.gated_delta_net(**given, backend="emulated"), run_definition(given)
        assert_close("o", got.o, expected[0], case.dtype)
        assert_close("final_state", got.final_state, expected[1], case.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_close_keys(world: Callable[..., None], dtype: torch.dtype) -> None:  # noqa: F811
    world(late=False)
    case = next(case for case in CLOSE_KEYS if case.name == "cosine-1-beta-2")
    case = replace(case, per_channel=True, dtype=dtype)
    check_against_rounding("emulated", case, make_inputs(case))


def test_a_summary_of_context_parallelism(world: Callable[..., None]) -> None:  # noqa: F811
    world(late=True)
    check_summary = test_distributed.test_a_summary_gives_the_final_state_from_any_state
    check_summary(replace(DENSE, T=70), "emulated", "cpu")


@pytest.mark.parametrize("name", TIMES)
def test_float16_ranges(world: Callable[..., None], name: str) -> None:  # noqa: F811
    world(late=False)
    case = next(case for case in RANGES if case.name == f"channels-{name}")
    check_ranges("emulated", case, backward=False)


@pytest.mark.usefixtures("poisoned_memory")
def test_tokens_past_the_last_sequence(world: Callable[..., None]) -> None:  # noqa: F811
    world(late=False)
    case = replace(DENSE, lengths=(33, 0, 70), T=0)
    inputs = padded(make_inputs(case), 100)
    o, state = gdn.gated_delta_net(**inputs, backend="emulated")
    assert not o[:, case.tokens :].any()
    assert_close("o", o[:, : case.tokens], truth(case)["o"], case.dtype)
    assert_close("state", state, truth(case)["final_state"], case.dtype)


@pytest.mark.parametrize("over_eight", [-41.5, -41.7])
def test_pairs_within_sixteen_tokens(
    world: Callable[..., None],  # noqa: F811
    over_eight: float,
) -> None:
    """On both sides of the limit, 2^-60 over eight tokens (-41.6): of one channel, which q, k and
    the state leave out, beside small decays, and of all. NaN is not lost."""
    world(late=False)
    case = replace(DENSE, K=128, gates="weak", state_v_first=True)
    inputs = make_inputs(case)
    for n in "qk":
        inputs[n][..., 0] = 0
    inputs["initial_state"][..., 0] = 0
    for channels in (slice(0, 1), slice(None)):
        inputs["g"][..., channels] = over_eight / 8
        expected = run_definition(inputs)
        got = gdn.gated_delta_net(**inputs, backend="emulated")
        assert_close("o", got.o, expected[0], case.dtype)
        assert_close("final_state", got.final_state, expected[1], case.dtype)
    inputs = make_inputs(case)
    inputs["g"][:, 20, 1, 5] = torch.nan
    o, _ = gdn.gated_delta_net(**inputs, backend="emulated")
    assert o[:, 20:, 1].isnan().all()
    assert not o[:, :, 0].isnan().any()


@pytest.mark.parametrize("slow", [0, 3, 4, 7])
def test_a_warp_of_prepare_may_be_slow(
    world: Callable[..., None],  # noqa: F811
    slow: int,
) -> None:
    world(late=True, slow=slow)
    check(FUSED, make_inputs(FUSED))


LONG = (
    replace(FUSED, name="two-warpgroups", T=70, B=34, K=64),
    replace(FUSED, name="segments", T=300, B=2, gates="model"),
    replace(FUSED, name="pieces", T=2000, gates="model"),
    replace(FUSED, name="packed-pieces", lengths=(1700, 0, 2400, 30), T=0, gates="model"),
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*FORWARD, *LONG], ids=lambda case: case.name)
def test_forward_on_a_gpu(monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype) -> None:
    """It agrees, and a second run gives the same bits."""
    monkeypatch.setattr(forward, "MIN_SEGMENT_CHUNKS", 2)
    case = replace(case, dtype=dtype)
    inputs = make_inputs(case, "cuda")
    first, second = (run("tilelang", case, inputs) for _ in range(2))
    for name, value in first.items():
        assert_close(name, value, truth(case)[name], dtype)
        assert torch.equal(value, second[name]), name


def test_what_is_not_there_is_refused() -> None:
    def reasons(case: Case, **changes: Any) -> list[str]:
        found = gdn.explain(**make_inputs(case, "meta")).problem
        return BACKEND.unsupported(replace(found, **changes))

    assert not reasons(FUSED)
    assert not reasons(FUSED, needs_grad=True)
    (reason,) = reasons(replace(FUSED, per_channel=False, gate_lower_bound=-5.0))
    assert reason == "gate_lower_bound needs a decay per channel, except in decode"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pieces"])
def test_neither_spills_nor_serialises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype, cut: bool
) -> None:
    """Scans in float16 spill up to 28 registers, where those of a decay per head spill 11."""
    if cut:
        for module in (pieces, piece_lengths):
            monkeypatch.setattr(module, "piece_length", lambda call, rows: 128)
    plan, _ = plan_of(replace(FUSED, T=256, B=40, dtype=dtype))
    for kernel in compile_together(*plan.jobs(save=False)):
        assert_compiles_well(kernel, tmp_path, spilled=112 if dtype == torch.float16 else 0)
