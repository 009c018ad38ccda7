"""Gradients of a decay per channel on TileLang's kernels, in the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gdn
from gdn.problem import Call
from gdn.testing import (
    CLOSE_KEYS,
    Case,
    gradients,
    make_inputs,
    make_output_gradients,
    with_gradients,
)

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

import test_distributed
import test_padded_packs
from gdn.backends.common import chunking
from gdn.backends.tilelang import memory_rounds as rounds
from gdn.backends.tilelang import piece_lengths
from gdn.backends.tilelang.backward.plan import BackwardPass
from support import assert_close, compile_together, poisoned_memory, run, truth  # noqa: F401
from test_close_keys import check_against_rounding
from test_float16_ranges import CASES as RANGES
from test_float16_ranges import TIMES, check_ranges
from test_tilelang import assert_compiles_well, plan_of
from test_tilelang_channels import DENSE, FORWARD, FUSED, LONG, with_other_gates
from test_tilelang_emulated import check, folder, pieces, world  # noqa: F401

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SMALL = replace(DENSE, name="small", T=70)
GROUPED = replace(FUSED, name="grouped", T=200, B=2, H=2, HV=4, gates="model", state_v_first=False)
CASES = (
    SMALL,
    *FORWARD,
    replace(SMALL, name="weak", gates="weak", cosine=0.9),
    replace(SMALL, name="wide-keys", K=128, initial_state=False),
    replace(SMALL, name="blocks", T=33, K=96, V=192, fused=True),  # `head_blocks.py`
)


STRONG = replace(SMALL, name="strong", gates="strong")
"""In bfloat16 alone: at -20 a token dbeta is rowsum(R * V), a small sum of large ones. In float16
it is off by 1.3e-3 for a tolerance of 1e-3, where dv, which is beta R, is off by 3e-4."""


def may_miss(request: pytest.FixtureRequest, case: Case, dtype: torch.dtype) -> None:
    """A_log misses its bound in float16 where all gates are near -5 a token, and where value heads
    share keys (on a GPU)."""
    if case.name in ("bounded", "grouped") and dtype == torch.float16:
        reason = "A_log off by 1.2e-3, for 1e-3; docs/log/open.md"
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=False))


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for dtype in (torch.bfloat16, torch.float16) for case in CASES),
        (STRONG, torch.bfloat16),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_gradients(
    request: pytest.FixtureRequest,
    world: Callable[..., None],  # noqa: F811
    case: Case,
    dtype: torch.dtype,
    late: bool,
) -> None:
    may_miss(request, case, dtype)
    world(late)
    case = replace(case, dtype=dtype)
    check(case, with_gradients(make_inputs(case)))


@pytest.mark.parametrize("over_eight", [-41.5, -41.7])
@pytest.mark.parametrize("tokens", [1, 8])
def test_pairs_within_sixteen_tokens(
    world: Callable[..., None],  # noqa: F811
    over_eight: float,
    tokens: int,
) -> None:
    """On both sides of the limit, 2^-60 over eight tokens (-41.6): by one token, or by all."""
    world(late=False)
    case = replace(DENSE, K=128, T=64, gates="weak")
    inputs = make_inputs(case)
    inputs["g"][..., 1::2] = 0
    inputs["g"][:, 16 : 16 + tokens, :, ::2] = over_eight / tokens
    exact = run("torch", case, with_gradients(inputs, torch.float64))
    for name, value in run("emulated", case, with_gradients(inputs)).items():
        assert_close(name, value, exact[name], case.dtype)


def test_pieces(world: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    world(late=True)
    for module in (pieces, piece_lengths):
        monkeypatch.setattr(module, "piece_length", lambda call, rows: 128)
    case = replace(FUSED, T=300, fused=False, gates="weak")
    check(case, with_gradients(make_inputs(case)))


@pytest.mark.parametrize(
    ("B", "T", "shares"), [(1, 250, (1, 4)), (5, 70, (2, 1))], ids=["parts", "sequences"]
)
def test_rounds(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    B: int,
    T: int,
    shares: tuple[int, int],
) -> None:
    world(late=False)
    monkeypatch.setattr(rounds, "MIN_ROUND_BYTES", 1)
    monkeypatch.setattr(rounds, "sm_count", lambda device: 3)
    case = replace(GROUPED, B=B, T=T, H=1, HV=2)
    inputs = with_gradients(make_inputs(case))
    assert rounds.round_shape(Call(**{"scale": 1.0} | inputs)) == shares
    check(case, inputs)


@pytest.mark.parametrize("slow", [0, 3, 4, 7])
def test_a_warp_may_be_slow(world: Callable[..., None], slow: int) -> None:  # noqa: F811
    world(late=True, slow=slow)
    check(GROUPED, with_gradients(make_inputs(GROUPED)))


@pytest.mark.parametrize("wanted", ["o", "final_state"])
def test_one_output_alone(world: Callable[..., None], wanted: str) -> None:  # noqa: F811
    world(late=False)
    inputs = make_inputs(SMALL)
    inputs["g"] *= 0.05
    inputs, exact = with_gradients(inputs), with_gradients(inputs, torch.float64)
    names = ["q", "k", "v", "g", "beta", "initial_state"]
    weights = torch.randn(
        getattr(gdn.gated_delta_net(**exact, backend="torch"), wanted).shape,
        generator=torch.Generator().manual_seed(3),
    )
    found = []
    for given, backend in ((inputs, "emulated"), (exact, "torch")):
        out = getattr(gdn.gated_delta_net(**given, backend=backend), wanted)
        loss = (out * weights.to(out.dtype) / 32).sum()
        found.append(torch.autograd.grad(loss, [given[name] for name in names]))
    for name, value, true in zip(names, *found, strict=True):
        assert_close(name, value, true, SMALL.dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pieces"])
def test_tokens_past_the_last_sequence(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    cut: bool,
) -> None:
    """Outputs and gradients there are zero."""
    world(late=False)
    if cut:
        monkeypatch.setattr(chunking, "MIN_PIECE_CHUNKS", 1)
    case = replace(DENSE, name="padded", lengths=(33, 0, 64, 70), T=0, fused=True)
    test_padded_packs.check("emulated", case, "cpu", 100)


def test_other_gates(world: Callable[..., None]) -> None:  # noqa: F811
    world(late=False)
    case = replace(DENSE, K=128, T=65)
    for given in with_other_gates(case):
        found = []
        for inputs, backend in (
            (with_gradients(given), "emulated"), (with_gradients(given, torch.float64), "torch")
        ):  # fmt: skip
            outputs = gdn.gated_delta_net(**inputs, backend=backend)
            found.append(gradients(outputs, inputs, make_output_gradients(case)))
        for name, value in found[0].items():
            assert_close(name, value, found[1][name], case.dtype)


@DTYPES
def test_close_keys(world: Callable[..., None], dtype: torch.dtype) -> None:  # noqa: F811
    world(late=False)
    case = next(case for case in CLOSE_KEYS if case.name == "cosine-1-beta-2")
    case = replace(case, per_channel=True, dtype=dtype)
    check_against_rounding("emulated", case, with_gradients(make_inputs(case)))


def test_a_summary_of_context_parallelism(world: Callable[..., None]) -> None:  # noqa: F811
    world(late=True)
    check_summary = test_distributed.test_a_summary_of_gradients_gives_that_of_the_initial_state
    check_summary(SMALL, "emulated", "cpu")


@pytest.mark.parametrize("name", TIMES)
def test_float16_ranges(world: Callable[..., None], name: str) -> None:  # noqa: F811
    world(late=False)
    check_ranges("emulated", next(case for case in RANGES if case.name == f"channels-{name}"))


@DTYPES
def test_neither_spills_nor_serialises(tmp_path: Path, dtype: torch.dtype) -> None:
    """`channel_gradients` spills what all of its products and levels share, at most 360 bytes:
    fields of the chunk and addresses of 64 bits. With both ways to near pairs, 120 more."""
    _, call = plan_of(replace(FUSED, T=256, B=40, dtype=dtype))
    for kernel in compile_together(*BackwardPass(call).jobs(initial=True, final=True)):
        last = "channel_gradients_kernel" in kernel.get_kernel_source()
        assert_compiles_well(kernel, tmp_path, spilled=480 if last else 8)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", [*CASES, GROUPED, *LONG], ids=lambda case: case.name)
def test_gradients_on_a_gpu(request: pytest.FixtureRequest, case: Case, dtype: torch.dtype) -> None:
    """They agree, and a second run gives the same bits."""
    may_miss(request, case, dtype)
    case = replace(case, dtype=dtype)
    inputs = with_gradients(make_inputs(case, "cuda"))
    first, second = (run("tilelang", case, inputs) for _ in range(2))
    for name, value in first.items():
        assert_close(name, value, truth(case)[name], dtype)
        assert torch.equal(value, second[name]), name
