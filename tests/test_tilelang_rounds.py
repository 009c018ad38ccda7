"""Memory rounds of TileLang's backward: which calls are divided how, and, in the emulator and on a
GPU, what backward computes where `recompute_states` scans stretches in parallel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("tilelang")
emulated = pytest.importorskip("test_tilelang_emulated")

from gdn.backends.tilelang import BACKEND, catalogue  # noqa: E402
from gdn.backends.tilelang import memory_rounds as rounds  # noqa: E402
from gdn.backends.tilelang.backward.plan import BackwardPass  # noqa: E402
from gdn.backends.tilelang.forward.plan import ForwardPass, saved_shapes  # noqa: E402
from support import assert_close, run, truth  # noqa: E402
from test_tilelang import call_of  # noqa: E402
from test_tilelang_emulated import folder, world  # noqa: E402, F401

from gdn.problem import Call  # noqa: E402
from gdn.testing import Case, make_inputs, with_gradients  # noqa: E402

WHOLE, PARTS = 1 << 40, 1
"""Bytes of a round, so that a call is one round, or as many as it may be."""
STRETCHED = Case("stretched", H=1, HV=2, K=64, V=64, dtype=torch.bfloat16, l2norm=True)


@pytest.mark.parametrize(
    ("H", "HV", "B", "T", "shares"),
    [
        (16, 32, 1, 32768, (1, 4)),
        (16, 32, 1, 8192, (1, 1)),  # 336 MB
        (16, 16, 16, 2048, (8, 1)),  # 671 MB
        (16, 32, 4, 8192, (1, 1)),
        (16, 64, 1, 131072, (1, 4)),
        (16, 16, 2, 131072, (2, 1)),  # one alone leaves SMs idle
        (8, 16, 1, 131072, (1, 1)),  # in pieces
        (16, 48, 1, 32768, (1, 4)),
        (16, 48, 1, 8192, (1, 1)),
        (16, 48, 4, 8192, (2, 1)),
        (16, 48, 2, 32768, (1, 2)),
    ],
)
def test_rounds_of_backward(H: int, HV: int, B: int, T: int, shares: tuple[int, int]) -> None:
    call = call_of(H, HV, B, T)
    found, saved = rounds.memory_rounds(call), rounds.stretches(call)
    assert rounds.round_shape(call) == shares
    chunks = [(n, c) for r in found for n in range(r.first, r.last) for c in range(r.start, r.stop)]
    assert sorted(chunks) == [(n, c) for n in range(B) for c in range(T // 64)]
    first = [r for r in found if r.first == 0]
    assert len(first) == shares[1]
    assert [n for r in reversed(first) for n in range(r.stretch, r.end)] == [*range(len(saved))]
    for r in found:
        assert saved[r.stretch][0] == r.start
        assert sum(saved[r.end - 1]) == r.stop


def test_rounds_bound_the_memory_of_backward() -> None:
    """16/32 1x32768: forward and backward take no more than FlashQLA's 1.58 GB."""
    call = call_of(16, 32, 1, 32768)
    outputs = (call.v, call.q, call.k, call.v, call.g, call.beta)  # o, and gradients
    kept = [math.prod(shape) * dtype.itemsize for shape, dtype in saved_shapes(call)]
    between = max(r.slots for r in rounds.memory_rounds(call)) * 32 * 128 * 2 * (2 * 128 + 64)
    assert sum(x.nbytes for x in outputs) + sum(kept) + between <= 1.58e9


@pytest.mark.parametrize(
    ("HV", "B", "T", "length", "number"),
    [
        (48, 1, 32768, 4096, 8),  # two in each of four parts
        (48, 2, 32768, 8192, 4),  # two in each of two parts of each sequence
        (48, 1, 8192, 2048, 4),  # one round
        (34, 1, 8200, 33 * 64, 4),  # the last one is shorter
        (49, 1, 8192, 2048, 4),
        (48, 1, 700, 512, 2),
        (48, 1, 512, None, 1),
        (48, 1, 1, None, 1),
        (48, 4, 8192, None, 1),
        (32, 1, 32768, None, 4),  # 64 blocks, all side by side
        (50, 1, 8192, None, 1),  # 100 blocks
        (64, 1, 32768, None, 4),
    ],
)
def test_stretches_of_a_sequence(HV: int, B: int, T: int, length: int | None, number: int) -> None:
    call = call_of(1, HV, B, T)
    found = rounds.stretches(call)
    assert rounds.stretch_length(call) == length
    assert len(found) == number
    assert [c for first, n in found for c in range(first, first + n)] == [*range(-(-T // 64))]
    saved = [shape for shape, _ in saved_shapes(call)[2:]]
    assert saved == ([(number - 1, *call.state_shape)] if number > 1 else [])
    if number > 1:
        assert [segment[:2] for segment in ForwardPass(call).segments[True]] == found


def changed(**changes: Any) -> Call:
    return call_of(16, 48, 1, 32768)._replace(**changes)


@pytest.mark.parametrize(
    "call",
    [
        changed(cu_seqlens=torch.empty(2, dtype=torch.int32, device="meta")),
        changed(batch_invariant=True),
        changed(context_parallel=True),
        changed(g=torch.empty(1, 32768, 48, 128, device="meta")),
        call_of(16, 32, 1, 32768),
    ],
    ids=["packed", "batch-invariant", "context-parallel", "per-channel", "16/32"],
)
def test_other_calls_have_no_stretches(call: Call) -> None:
    assert not rounds.fills_badly(call)
    assert rounds.stretch_length(call) is None
    assert rounds.stretches(call) == rounds.sequence_parts(call)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_kernels_of_stretches(initial: bool, final: bool) -> None:
    """`recompute_states` has pieces, and both scans start from states; no other kernel is cut."""
    for T, HV, stretched in ((8192, 48, True), (8192, 32, False), (512, 48, False)):
        jobs = BackwardPass(call_of(16, HV, 1, T)).jobs(initial, final)
        names = [kernel.name for kernel, _ in jobs]
        assert names == ["gate_sums", "recompute_states", "reverse_scan", "gradients"]
        states, reverse = jobs[1][1], jobs[2][1]
        assert (states["cut"], states["initial"]) == (stretched, stretched or initial)
        assert (reverse["cut"], reverse["v_first"]) == (False, False)
        starts = reverse["final"], reverse["initial"]
        assert starts == ((True, True) if stretched else (final, initial))


def test_kernels_of_rounds_and_batches_are_prebuilt() -> None:
    full_name = catalogue.prebuilt.full_name
    wanted = catalogue.wanted_jobs(("training",), ("bfloat16",), (128,))
    names = {full_name(kernel.name, options) for kernel, options in wanted}
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for H, HV, B, T in (
        (16, 48, 1, 8192),
        (16, 48, 4, 8192),
        (16, 64, 2, 32768),
        (16, 32, 4, 8192),
    ):
        for invariant in (False, True):
            call = call_of(H, HV, B, T)._replace(**options, batch_invariant=invariant)
            needed = {full_name(kernel.name, x) for kernel, x in BACKEND.jobs(call, backward=True)}
            assert needed <= names, (H, HV, B, T, invariant, needed - names)


def stretch(monkeypatch: pytest.MonkeyPatch, size: int, sms: int | None = 3) -> None:
    """Divide short sequences. size: bytes of a round; sms: so few that two blocks fill them badly,
    None: those of the GPU."""
    monkeypatch.setattr(rounds, "MIN_ROUND_BYTES", size)
    monkeypatch.setattr(rounds, "MIN_STRETCH_CHUNKS", 1)
    if sms is not None:
        monkeypatch.setattr(rounds, "sm_count", lambda device: sms)


def check(backend: str, case: Case, inputs: dict[str, Any], lengths: list[int]) -> None:
    """lengths: chunks of the stretches."""
    assert [n for _, n in rounds.stretches(Call(**{"scale": 1.0} | inputs))] == lengths
    expected = truth(case, inputs["output_final_state"])
    for name, value in run(backend, case, inputs).items():
        assert_close(name, value, expected[name], case.dtype)


@pytest.mark.parametrize(
    ("dtype", "v_first", "late"),
    [(torch.bfloat16, False, False), (torch.float16, True, True)],
    ids=["bfloat16-early", "float16-v-first-late"],
)
@pytest.mark.parametrize(
    ("B", "T", "initial", "size", "lengths"),
    [
        (1, 290, True, WHOLE, [2, 2, 1]),
        (1, 130, False, WHOLE, [1, 1, 1]),
        (1, 530, False, PARTS, [2, 1] * 3),
        (2, 200, True, PARTS, [1, 1, 1, 1]),
    ],
    ids=["one-round", "as-many-chunks", "parts", "sequences-and-parts"],
)
def test_stretches_agree_with_the_definition(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    B: int,
    T: int,
    initial: bool,
    size: int,
    lengths: list[int],
    dtype: torch.dtype,
    v_first: bool,
    late: bool,
) -> None:
    world(late)
    stretch(monkeypatch, size)
    case = replace(STRETCHED, B=B, T=T, initial_state=initial, state_v_first=v_first, dtype=dtype)
    check("emulated", case, with_gradients(make_inputs(case)), lengths)


def test_stretches_without_a_final_state(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world(late=False)
    stretch(monkeypatch, WHOLE)
    case = replace(STRETCHED, T=200, initial_state=False)
    inputs = with_gradients(make_inputs(case)) | {"output_final_state": False}
    check("emulated", case, inputs, [1, 1, 1, 1])


def test_two_sequences_a_round(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a sequence would be a round: the last round has one."""
    world(late=False)
    stretch(monkeypatch, PARTS)
    case = replace(STRETCHED, B=5, T=70)
    inputs = with_gradients(make_inputs(case))
    found = rounds.memory_rounds(Call(**{"scale": 1.0} | inputs))
    assert [(r.first, r.last) for r in found] == [(0, 2), (2, 4), (4, 5)]
    check("emulated", case, inputs, [2])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "T", "shares"), [(1, 1000, (1, 4)), (3, 300, (1, 2))], ids=["parts", "both"]
)
def test_backward_in_rounds(
    monkeypatch: pytest.MonkeyPatch, B: int, T: int, shares: tuple[int, int]
) -> None:
    """Each memory round reuses the buffers of the one before."""
    monkeypatch.setattr(rounds, "MIN_ROUND_BYTES", 1)
    case = Case(
        "rounds", T=T, B=B, H=16, HV=32, K=128, V=128, dtype=torch.bfloat16, fused=True,
        gates="model",
    )  # fmt: skip
    inputs = with_gradients(make_inputs(case, "cuda"))
    assert rounds.round_shape(Call(**{"scale": 1.0} | inputs)) == shares
    expected = truth(case)
    for name, value in run("tilelang", case, inputs).items():
        assert_close(name, value, expected[name], case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("initial", [False, True])
def test_stretches_beside_the_reverse_scan(
    monkeypatch: pytest.MonkeyPatch, initial: bool, dtype: torch.dtype
) -> None:
    """On two streams, as 36 value heads have them on 132 SMs, in one round and in parts."""
    case = replace(STRETCHED, T=330, H=12, HV=36, K=128, V=128, initial_state=initial, dtype=dtype)
    for size, lengths in ((WHOLE, [2, 2, 2]), (PARTS, [1, 1] * 3)):
        stretch(monkeypatch, size, None)
        check("tilelang", case, with_gradients(make_inputs(case, "cuda")), lengths)
