"""Forward in one kernel (`forward/fused.py`) that keeps what backward needs: against the definition
and against what `prepare` keeps, in the emulator and on a GPU, and through ptxas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.problem import Call
from gdn.testing import CLOSE_KEYS, Case, make_inputs

pytest.importorskip("tilelang")
emulated = pytest.importorskip("test_tilelang_emulated")
compiled = pytest.importorskip("test_tilelang")

from gdn.backends.tilelang import memory_rounds as rounds  # noqa: E402
from gdn.backends.tilelang import piece_lengths  # noqa: E402
from gdn.backends.tilelang.backward.plan import BackwardPass  # noqa: E402
from gdn.backends.tilelang.forward import fused_plan  # noqa: E402
from gdn.backends.tilelang.forward import plan as forward  # noqa: E402
from support import compile_together, with_gradients  # noqa: E402
from test_close_keys import check_against_rounding  # noqa: E402
from test_padded_packs import check as check_padded  # noqa: E402
from test_tilelang_emulated import WORLDS, check, folder, world  # noqa: E402, F401
from test_tilelang_fused import (  # noqa: E402, F401
    CASES,
    ON_GPU,
    alone,
    check_twice_on_a_gpu,
    one_kernel,
)


def forward_and_backward(case: Case) -> None:
    check(case, with_gradients(make_inputs(case)))


@WORLDS
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_gradients_agree_with_the_definition(
    world: Callable[..., None],  # noqa: F811
    case: Case,
    late: bool,
) -> None:
    world(late)
    forward_and_backward(case)


def saved_by(case: Case, inputs: dict[str, Any]) -> list[Tensor]:
    call = Call(**{"scale": case.K**-0.5} | inputs)
    return forward.ForwardPass(call).forward(call, save=True).saved


@pytest.mark.parametrize("l2norm", [False, True])
def test_keeps_what_prepare_keeps(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    l2norm: bool,
) -> None:
    """The norms of every key head, and A with zeros above its diagonal."""
    world(late=True)
    case = replace(CASES["dense"], H=2, HV=4, T=192, l2norm=l2norm)
    inputs = make_inputs(case)
    norms, A = saved_by(case, inputs)
    monkeypatch.setattr(fused_plan, "MIN_SHARE", 2.0)
    expected_norms, expected_A = saved_by(case, inputs)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(A.float(), expected_A.float(), rtol=2**-7, atol=1e-6)
    assert not A.float().triu(1).any()


@pytest.mark.parametrize("tokens", [1, 70])
def test_what_lies_past_the_end_reaches_no_gradient(
    world: Callable[..., None],  # noqa: F811
    tokens: int,
) -> None:
    """The rows of q past the end are cleared by a warp that may come after the one that sums their
    squares."""
    world(late=True, slow=0)
    case = Case(
        "padded", lengths=(70, 3), H=1, HV=1, K=64, V=128, l2norm=True, dtype=torch.bfloat16
    )
    check_padded("emulated", case, "cpu", tokens)


@WORLDS
def test_thread_blocks_with_many_sequences(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
) -> None:
    """A of the last chunk of a sequence leaves while the next sequence begins."""
    world(late)
    monkeypatch.setattr(fused_plan, "sm_count", lambda device: 2)
    for case in (CASES["packed"], replace(CASES["dense"], B=5, T=70)):
        forward_and_backward(case)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward's one kernel and backward have pieces of three chunks."""
    for module in (fused_plan, piece_lengths):
        monkeypatch.setattr(module, "one_kernel_length", lambda call: 192)
    for module in (piece_lengths, rounds):
        monkeypatch.setattr(module, "piece_length", lambda call, rows: 384)


PIECES = pytest.mark.parametrize(
    "case",
    [
        Case("none-forgets", T=500, H=1, HV=2, K=128, V=128, dtype=torch.bfloat16, gates="weak"),
        Case(
            "some-forget", T=450, H=1, HV=2, K=128, V=128, fused=True, dtype=torch.bfloat16,
            gates="mixed", initial_state=False,
        ),
        Case(
            "all-forget", T=400, B=2, H=1, HV=1, K=64, V=128, dtype=torch.bfloat16, l2norm=True,
            gates="fast", state_v_first=True,
        ),
    ],
    ids=lambda case: case.name,
)  # fmt: skip


@WORLDS
@PIECES
@pytest.mark.usefixtures("alone", "cut")
def test_pieces(world: Callable[..., None], case: Case, late: bool) -> None:  # noqa: F811
    """Backward scans the pieces of the one kernel, from its states and transfer matrices."""
    world(late)
    forward_and_backward(case)


@pytest.mark.parametrize("slow", [0, 1, 3, 8, 14])
def test_a_warp_may_be_slow(world: Callable[..., None], slow: int) -> None:  # noqa: F811
    """The warp that copies A, two others of its warpgroup, a consumer and the gate warp."""
    world(late=True, slow=slow)
    forward_and_backward(replace(CASES["dense"], B=1, T=270, fused=True))


def test_a_missing_wait_for_a_copy_shows(world: Callable[..., None]) -> None:  # noqa: F811
    """The wait until A of the chunk before has left its tile."""

    removed = []

    def edit(source: str) -> str:
        if "A_out_desc" not in source:
            return source
        before, wait, after = source.partition("tl::tma_store_wait<0, true>();")
        removed.append(wait)
        return before + after

    world(True, edit, slow=0)
    with pytest.raises((AssertionError, RuntimeError)):
        forward_and_backward(replace(CASES["dense"], B=1, T=270))
    assert any(removed)


@pytest.mark.parametrize("name", ["cosine-1-beta-2", "long-equal-keys"])
def test_close_keys_cost_no_more_than_rounding(
    world: Callable[..., None],  # noqa: F811
    name: str,
) -> None:
    world(late=True)
    (case,) = (case for case in CLOSE_KEYS if case.name == name)
    case = replace(case, V=128, dtype=torch.bfloat16)
    check_against_rounding("emulated", case, with_gradients(make_inputs(case)))


def test_pieces_spill_outside_of_loops(cut: None, tmp_path: Path) -> None:
    """The transfer scan and the final one."""
    plan, _ = compiled.plan_of(replace(CASES["dense"], T=500))
    transfer, _, last = plan.jobs(save=True)
    for kernel in compile_together(transfer, last):
        compiled.assert_compiles_well(kernel, tmp_path, spilled=24)


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_serialises_no_product_and_spills_outside_of_loops(name: str, tmp_path: Path) -> None:
    """As without saving, with one or two addresses more."""
    plan, _ = compiled.plan_of(CASES[name])
    (kernel,) = compile_together(*plan.jobs(save=True))
    compiled.assert_compiles_well(kernel, tmp_path, spilled=24 if name == "dense" else 56)


@pytest.mark.parametrize(
    ("B", "T", "HV", "chosen"),
    [
        (4, 8192, 32, True),
        (1, 8192, 32, False),  # too few scans
        (1, 2048, 96, True),
        (3, 32768, 32, False),  # backward needs states between parts of sequences
        (1, 32768, 16, True),  # in pieces
        (1, 32768, 8, False),  # too many pieces
        (1, 32768, 20, False),  # `prepare` and `scan` have pieces, the one kernel has none
        (1, 8192, 16, False),
    ],
)
def test_is_chosen_from_shapes_alone(
    monkeypatch: pytest.MonkeyPatch, B: int, T: int, HV: int, chosen: bool
) -> None:
    """Tensors on the meta device count as on a GPU with 132 SMs."""
    monkeypatch.undo()
    x = torch.empty((B, T, HV, 128), device="meta", dtype=torch.bfloat16)
    call = Call(x, x, x, x[..., 0], x[..., 0])
    plan = forward.ForwardPass(call)
    jobs = plan.jobs(save=True)
    assert (jobs[-1][0].name == "fused_forward") is chosen
    assert all(options["save"] for job, options in jobs if job.name == "fused_forward")
    assert BackwardPass(call).length == plan.pieces[True][0]
    assert (plan.pieces[True][0] is not None) == ("combine_pieces" in {x.name for x, _ in jobs})


@pytest.mark.gpu
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "case",
    [case for case in ON_GPU if not case.per_channel],  # which the one kernel does not take
    ids=lambda case: f"{case.name}-{str(case.dtype)[6:]}",
)
def test_agrees_with_the_definition_on_a_gpu(case: Case) -> None:
    check_twice_on_a_gpu(case, with_gradients(make_inputs(case, "cuda")))


@pytest.mark.gpu
@PIECES
@pytest.mark.usefixtures("alone", "cut")
def test_pieces_on_a_gpu(case: Case) -> None:
    check_twice_on_a_gpu(case, with_gradients(make_inputs(case, "cuda")))
