"""Pieces by one kernel, and the chunks that its transfer scan skips (`forward/forgetting.py`), in
the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gdn
from gdn.testing import TOLERANCE, Case, make_inputs, relative_error

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

from gdn.backends.tilelang import TileLangBackend
from gdn.backends.tilelang.forward import fused_plan
from support import TOKENS, assert_close, compile_together, run, truth
from test_float16_ranges import LARGE_STATES, check_ranges
from test_tilelang_emulated import WORLDS, check, folder, world  # noqa: F401

LENGTH = 192  # tokens of a piece: three chunks
CUT = Case(
    "cut", T=500, H=1, HV=2, K=128, V=128, dtype=torch.bfloat16, gates="weak", state_v_first=True
)  # fmt: skip


@pytest.fixture
def forgets(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Sequences are cut into pieces of three chunks. The list gets what each call's transfer scan
    says of its pieces."""
    found = []

    def allocator(shape: Any, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
        def fill() -> torch.Tensor:
            x = torch.full(shape, -1 if dtype == torch.int32 else torch.nan, device=device)
            x = x.to(dtype)
            if dtype == torch.int32:
                found.append(x)
            return x

        return fill

    monkeypatch.setattr(fused_plan, "allocator", allocator)
    monkeypatch.setattr(fused_plan, "one_kernel_length", lambda call: LENGTH)
    return found


@WORLDS
@pytest.mark.parametrize("initial", [True, False])
def test_pieces_of_which_none_forgets(
    world: Callable[..., None],  # noqa: F811
    forgets: list[torch.Tensor],
    initial: bool,
    late: bool,
) -> None:
    world(late)
    case = replace(CUT, initial_state=initial)
    check(case, make_inputs(case))
    assert forgets[0].tolist() == [[0, 0], [0, 0], [-1, -1]]  # nobody asks the last one


@pytest.mark.parametrize(
    ("K", "dtype", "gates", "options"),
    [
        (64, torch.bfloat16, "weak", {"fused": True}),
        (128, torch.float16, "weak", {"l2norm": True}),
        (128, torch.bfloat16, "mixed", {"fused": True, "initial_state": False}),
        (128, torch.bfloat16, "fast", {"l2norm": True}),
    ],
)
def test_packed_pieces(
    world: Callable[..., None],  # noqa: F811
    forgets: list[torch.Tensor],
    K: int,
    dtype: torch.dtype,
    gates: Any,
    options: dict[str, Any],
) -> None:
    """With tokens past the last sequence, on which nothing depends."""
    world(late=True)
    case = replace(
        CUT, K=K, T=0, lengths=(450, 0, 70, 193), gates=gates, dtype=dtype, state_v_first=False,
        **options,
    )  # fmt: skip
    inputs = make_inputs(case)
    for name in TOKENS:
        tail = torch.full_like(inputs[name][:, :9], torch.nan)
        inputs[name] = torch.cat((inputs[name], tail), 1)
    got = gdn.gated_delta_net(**inputs, backend="emulated")
    expected = truth(case)
    assert_close("o", got.o[:, : case.tokens], expected["o"], dtype)
    assert not got.o[:, case.tokens :].any()
    assert_close("final_state", got.final_state, expected["final_state"], dtype)
    if gates != "weak":  # then the pieces that another one follows forget
        assert forgets[0][:2].tolist() == [[1, 1]] * 2


def test_large_float16_states(
    world: Callable[..., None],  # noqa: F811
    forgets: list[torch.Tensor],
) -> None:
    world(late=True)
    check_ranges("emulated", replace(LARGE_STATES, T=250, V=128), backward=False)
    assert forgets[0].tolist() == [[0, 0], [-1, -1]]


@WORLDS
def test_a_piece_that_forgets_starts_at_the_first_chunk_that_matters(
    world: Callable[..., None],  # noqa: F811
    forgets: list[torch.Tensor],
    late: bool,
) -> None:
    """Head 0 forgets within two chunks, head 1 not quite within a piece."""
    world(late)
    inputs = make_inputs(replace(CUT, gates="none"))
    inputs["g"][..., 0] = -60.01 / (2 * 64)
    inputs["g"][..., 1] = -59.99 / LENGTH
    check_inputs(inputs)
    assert forgets[0].tolist() == [[1, 0], [1, 0], [-1, -1]]


def check_inputs(inputs: dict[str, Any]) -> None:
    """Agreement with the definition in float64, of a call of changed inputs."""
    exact = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    expected = gdn.gated_delta_net(**exact, backend="torch")
    got = gdn.gated_delta_net(**inputs, backend="emulated")
    assert_close("o", got.o, expected.o, torch.bfloat16)
    assert_close("final_state", got.final_state, expected.final_state, torch.bfloat16)


@pytest.mark.parametrize(
    ("length", "beta", "g", "forgotten"),
    [
        (1.0, 1.0, -0.4, 1),  # |1 - beta |k|^2| <= 1
        (3.0, 1.0, -0.4, 0),  # each token may multiply the state by 8
        (3.0, 1.0, -2.0, 0),  # log 8 = 2.08
        (3.0, 1.0, -3.0, 1),  # -0.92 a token: 66 of them, where the gates alone need 20
        (1.0, -1.0, -0.4, 0),  # log 2 = 0.69
        (1.0, -1.0, -1.4, 1),
        (1.0, 3.0, -1.4, 1),
        (1.0, 3.0, -0.4, 0),
    ],
)
@pytest.mark.parametrize("l2", [False, True])
def test_long_keys_and_strengths_count(
    world: Callable[..., None],  # noqa: F811
    forgets: list[torch.Tensor],
    length: float,
    beta: float,
    g: float,
    forgotten: int,
    l2: bool,
) -> None:
    if l2 and length > 1:
        pytest.skip("the norm makes it 1")
    world(late=False)
    inputs = make_inputs(replace(CUT, gates="none", l2norm=l2))
    inputs["k"] = length * torch.nn.functional.normalize(inputs["k"].float(), dim=-1).bfloat16()
    if not l2:  # rounding leaves lengths a little above 1
        inputs["k"] *= 0.98
    inputs["v"], inputs["beta"] = inputs["v"] * 0, torch.full_like(inputs["beta"], beta)
    inputs["g"] = torch.full_like(inputs["g"], g)
    gdn.gated_delta_net(**inputs, backend="emulated")
    assert forgets[0][:2].tolist() == [[forgotten] * 2] * 2


@pytest.mark.parametrize("name", ["g", "beta", "k"])
def test_nan_is_not_forgotten(
    world: Callable[..., None],  # noqa: F811
    forgets: list[torch.Tensor],
    name: str,
) -> None:
    """A NaN among the tokens that decide reaches the next piece, whose end forgets it."""
    world(late=False)
    inputs = make_inputs(replace(CUT, gates="none"))
    inputs["g"][:] = -1.0
    inputs[name][:, LENGTH - 2] = torch.nan
    o, _ = gdn.gated_delta_net(**inputs, backend="emulated")
    assert forgets[0].tolist() == [[0, 0], [1, 1], [-1, -1]]
    assert o[:, LENGTH - 2 : 2 * LENGTH].isnan().all()
    assert not o[:, 2 * LENGTH :].isnan().any()


def test_minus_infinity_is_forgotten(
    world: Callable[..., None],  # noqa: F811
    forgets: list[torch.Tensor],
) -> None:
    world(late=False)
    inputs = make_inputs(replace(CUT, gates="none"))
    inputs["g"][:, LENGTH - 2] = -torch.inf
    check_inputs(inputs)
    assert forgets[0].tolist() == [[1, 1], [0, 0], [-1, -1]]


def test_serialises_no_product_and_spills_nothing(tmp_path: Path) -> None:
    """The transfer scan."""
    compiled = pytest.importorskip("test_tilelang")
    plan, _ = compiled.plan_of(replace(CUT, T=64 * 32 * 66))
    kernel = compile_together(*plan.jobs(save=False))[0]
    compiled.assert_compiles_well(kernel, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("gates", ["none", "weak", "mixed", "model", "fast", "strong"])
@pytest.mark.parametrize("lengths", [None, (1000, 3, 0, 597, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_on_a_gpu(
    clean_registry: None, forgets: list[torch.Tensor], gates: Any, lengths: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Relative errors: one element in 10,000 of a float16 state is off by more than 1e-3."""
    gdn.register_backend(TileLangBackend(), replace=True)  # with plans of its own
    sizes: dict[str, Any] = {"T": 1664} if lengths is None else {"lengths": lengths}
    case = Case("pieces", **sizes, H=2, HV=4, K=128, V=128, dtype=dtype, gates=gates, l2norm=True)
    inputs = make_inputs(case, "cuda")
    expected = truth(case)
    got = run("tilelang", case, inputs)
    for name, value in got.items():
        assert relative_error(value, expected[name]) <= TOLERANCE[dtype], name
    for name, value in run("tilelang", case, inputs).items():
        assert torch.equal(value, got[name])
    assert len(forgets) == 2
    if gates in ("none", "fast"):
        assert bool(forgets[0][0].all()) == (gates == "fast")
