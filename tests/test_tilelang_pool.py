"""Prefill on a pool of states by TileLang's kernels: against the definition in the emulator, and
through ptxas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gdn
from gdn.testing.prefill import PREFILLS, PrefillCase, as_prefill, make_prefill

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

import test_prefill
import test_tilelang as compiled
from gdn.backends.common import chunking
from gdn.backends.tilelang.forward import fused_plan
from gdn.backends.tilelang.forward import plan as forward
from gdn.backends.tilelang.pool_plan import PoolPlan
from support import compile_together, poisoned_memory  # noqa: F401
from test_strided_inputs import measure
from test_tilelang_emulated import WORLDS, folder, world  # noqa: F401
from test_tilelang_fused import prefer_one_kernel


def with_sizes(case: PrefillCase) -> PrefillCase:
    """The case with K and V that the kernels have."""
    K, V = (x if x in (64, 128) else 64 for x in (case.K, case.V))
    return replace(case, K=K, V=V, dtype=torch.bfloat16)


EVERYTHING = PrefillCase(
    "everything", lengths=(130, 0, 70, 65, 0, 64), HV=4, fused=True, fresh=True, tail=3,
    checkpoints="pool", columns=2, pool=torch.bfloat16, padding=8, state_v_first=True,
    dtype=torch.bfloat16,
)  # fmt: skip
FLOAT16 = replace(
    EVERYTHING, name="float16", dtype=torch.float16, state_v_first=False, checkpoints="buffer",
    pool=torch.float32, fused=False, out=True, K=128, V=128,
)  # fmt: skip
ODD = replace(EVERYTHING, name="odd-slots", lengths=(65, 130, 0, 64), padding=7, pool=torch.float32)
"""States [V, K] of which every second one is not aligned to two numbers."""
SUITE = [with_sizes(case) for case in PREFILLS]


def check(case: PrefillCase) -> None:
    test_prefill.test_agrees_with_the_definition("emulated", "cpu", case, case.dtype)


@pytest.mark.usefixtures("poisoned_memory")
@WORLDS
@pytest.mark.parametrize("case", [EVERYTHING, FLOAT16, ODD], ids=lambda case: case.name)
def test_agrees_with_the_definition(
    world: Callable[..., None],  # noqa: F811
    case: PrefillCase,
    late: bool,
) -> None:
    world(late)
    check(case)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.name)
def test_suite(world: Callable[..., None], case: PrefillCase) -> None:  # noqa: F811
    world(late=True)
    check(case)


@pytest.mark.usefixtures("poisoned_memory")
def test_pieces(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world(late=True)
    monkeypatch.setattr(chunking, "MIN_PIECE_CHUNKS", 1)
    monkeypatch.setattr(chunking, "sm_count", lambda device: 10**4)
    check(with_sizes(test_prefill.PIECES))


@pytest.fixture
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take the one kernel that they can."""
    monkeypatch.setattr(forward, "prepare", None)  # not used
    prefer_one_kernel(monkeypatch)


@pytest.mark.usefixtures("poisoned_memory", "one_kernel")
@WORLDS
@pytest.mark.parametrize("case", [EVERYTHING, FLOAT16, ODD], ids=lambda case: case.name)
def test_one_kernel(
    world: Callable[..., None],  # noqa: F811
    case: PrefillCase,
    late: bool,
) -> None:
    world(late)
    check(replace(case, H=1, HV=2, K=128, V=128))


def test_parameters_in_bfloat16_beside_a_pool_in_bfloat16(
    world: Callable[..., None],  # noqa: F811
) -> None:
    world(late=False)
    case = replace(test_prefill.SHORT, dtype=torch.bfloat16)
    test_prefill.test_parameters_of_another_dtype_and_an_output_anywhere("emulated", "cpu", case)


LONG = replace(
    EVERYTHING, name="pieces", lengths=(450, 0, 200, 70, 193, 64), H=1, HV=2, K=128, V=128,
    columns=3,
)  # fmt: skip


@pytest.mark.usefixtures("poisoned_memory", "one_kernel")
@pytest.mark.parametrize("gates", ["weak", "mixed"])
@pytest.mark.parametrize("pool", [torch.bfloat16, torch.float32], ids=str)
def test_one_kernel_in_pieces(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    pool: torch.dtype,
    gates: Any,
) -> None:
    """Mixed gates forget pieces."""
    world(late=True)
    monkeypatch.setattr(fused_plan, "one_kernel_length", lambda call: 192)
    kv = pool == torch.float32
    check(replace(LONG, pool=pool, gates=gates, fused=False, state_v_first=not kv, out=kv))


@pytest.mark.parametrize(
    "bounds", [(9, -5, 400, 3, 2, 10**6, 80), (-(2**31), 2**31 - 1, -(2**31), 70, 2**31 - 1, 3, 0)]
)
@pytest.mark.parametrize("one", [False, True], ids=["two", "one"])
def test_bounds_may_hold_anything(
    request: pytest.FixtureRequest,
    world: Callable[..., None],  # noqa: F811
    bounds: tuple[int, ...],
    one: bool,
) -> None:
    """On a GPU nobody checks them. The emulator notices stores past a tensor, and slots that no
    sequence has keep their bits."""
    world(late=False)
    case = replace(EVERYTHING, H=1, HV=2, K=128, V=128) if one else EVERYTHING
    if one:
        request.getfixturevalue("one_kernel")
    inputs = make_prefill(case)
    inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    before = inputs["state"].clone()
    PoolPlan(as_prefill(inputs)).prefill(as_prefill(inputs))
    named = {*inputs["state_indices"].tolist(), *inputs["checkpoint_indices"].flatten().tolist()}
    for slot in {*range(len(before))} - named:
        assert torch.equal(inputs["state"][slot], before[slot])


@pytest.mark.parametrize("one", [False, True], ids=["two", "one"])
def test_checkpoints_in_any_order(
    request: pytest.FixtureRequest,
    world: Callable[..., None],  # noqa: F811
    one: bool,
) -> None:
    """More than a warp has lanes, some twice, among them offsets that name no state."""
    world(late=True)
    if one:
        request.getfixturevalue("one_kernel")
    case = replace(
        FLOAT16, lengths=(200, 0, 70, 64), dtype=torch.bfloat16, columns=3, H=1, HV=2, out=False
    )
    inputs = make_prefill(case)
    states: dict[tuple[int, int], torch.Tensor] = {}
    for order in ([64, 128, 192], [0, 192, 100, -64, 64, 10**6, 64, 256, 192] * 4 + [128]):
        offsets = torch.tensor([order] * 4, dtype=torch.int32)
        buffer = torch.full((*offsets.shape, *inputs["state"].shape[1:]), torch.nan)
        given = inputs | {"checkpoint_offsets": offsets, "checkpoints": buffer}
        given["state"] = inputs["state"].clone()
        PoolPlan(as_prefill(given)).prefill(as_prefill(given))
        for n, tokens in enumerate(case.lengths):
            for at, state in zip(order, buffer[n], strict=True):
                if at % 64 or not 0 < at <= tokens or inputs["state_indices"][n] not in range(40):
                    assert state.isnan().all()
                else:
                    assert torch.equal(states.setdefault((n, at), state), state)
                    assert state.isfinite().all()
    assert len(states) == 4


@pytest.mark.usefixtures("poisoned_memory")
def test_a_pool_without_slots(world: Callable[..., None]) -> None:  # noqa: F811
    """All sequences are skipped."""
    world(late=False)
    inputs = make_prefill(replace(EVERYTHING, checkpoints="none", columns=0))
    inputs["state"] = inputs["state"][:0]
    assert not gdn.gated_delta_net_prefill(**inputs, backend="emulated").any()


SLOTS = replace(EVERYTHING, lengths=(130, 0, 70, 65, 64, 64), checkpoints="none", columns=0)


@pytest.mark.parametrize("case", [SLOTS, EVERYTHING, FLOAT16], ids=["slots", "all", "float16"])
@pytest.mark.parametrize("fused", [False, True], ids=["two", "one"])
def test_neither_spills_in_loops_nor_serialises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: PrefillCase, fused: bool
) -> None:
    """Spilled are addresses and the slot, over the scan, and what is stored as a checkpoint, after
    it was rounded; in the one kernel in float16 scales of rows, too."""
    monkeypatch.setattr(fused_plan, "MIN_SHARE", 0.0 if fused else 2.0)
    case = replace(case, H=1, HV=2, K=128, V=128)
    kernels = compile_together(
        *PoolPlan(as_prefill(make_prefill(case))).forward_pass.jobs(save=False)
    )
    assert len(kernels) == (1 if fused else 2)
    one = 148 if case.name == FLOAT16.name else 40
    two = 16 if case.checkpoints == "none" else 64
    most = one if fused else two
    for kernel in kernels:
        compiled.assert_compiles_well(kernel, tmp_path, spilled=most)


ON_GPU = [EVERYTHING, FLOAT16, ODD, replace(LONG, lengths=(2000, 0, 640, 70, 1300, 64))]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("length", [None, 192], ids=["whole", "pieces"])
@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.name)
def test_one_kernel_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, one_kernel: None, case: PrefillCase, length: int | None
) -> None:
    monkeypatch.setattr(fused_plan, "one_kernel_length", lambda call: length)
    monkeypatch.setattr(fused_plan, "sm_count", lambda device: 2)  # many sequences a thread block
    case = replace(case, H=4, HV=8, K=128, V=128)
    test_prefill.test_agrees_with_the_definition("tilelang", "cuda", case, case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "HV", "kernels"),
    [
        ((300,) * 16, 16, 2),  # the one kernel, and zeros past the last sequence
        ((500,), 40, 3),
        ((1024, 1024), 8, 5),
        ((32768,), 8, 4),  # the one kernel in pieces
    ],
    ids=["one", "two", "pieces", "one-in-pieces"],
)
def test_nothing_is_gathered_or_scattered(lengths: tuple[int, ...], HV: int, kernels: int) -> None:
    """As many kernels as a call without a pool, and no more memory."""
    case = PrefillCase(
        "memory", lengths=lengths, H=HV // 2, HV=HV, K=128, V=128, own=True, fused=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    inputs = make_prefill(case, "cuda")
    own = ("state", "null_index")
    options = {name: x for name, x in inputs.items() if name not in own}
    slots = torch.arange(len(lengths), device="cuda").flip(0)
    fresh = slots < 0
    plain = {"initial_state": inputs["state"].clone(), "output_final_state": True}

    def on_pool() -> None:
        gdn.gated_delta_net_prefill(**inputs, state_indices=slots, fresh=fresh, backend="tilelang")

    peak, launched = measure(on_pool)
    plain_peak, plain_launched = measure(
        lambda: gdn.gated_delta_net(**options, **plain, backend="tilelang")
    )
    assert launched == plain_launched == kernels
    assert peak <= plain_peak
