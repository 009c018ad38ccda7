"""Decays and rows around the ranges in which the Triton backend takes many pairs of tokens in one
product, with a decay per channel."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_close

import gdn
from gdn.testing import (
    Case,
    gradients,
    make_inputs,
    make_output_gradients,
    run_definition,
    with_gradients,
)

pytest.importorskip("triton")


Inputs = dict[str, Any]


def inputs_with_gates(case: Case, g: float, device: str) -> Inputs:
    """Inputs of a case in which every other channel decays by g a token, and the others little."""
    given = make_inputs(case, device)
    given["g"][..., ::2] = g
    given["g"][..., 1::2] *= 0.01
    return given


def check_forward(given: Callable[[str], Inputs], device: str, size: float = 1.0) -> None:
    """Forward of the inputs that `given` makes on a device agrees with the definition. size: of o,
    which is divided by it."""
    inputs = given(device)
    got, expected = gdn.gated_delta_net(**inputs, backend="triton"), run_definition(given("cpu"))
    assert_close("o", got.o / size, expected[0] / size, inputs["q"].dtype)
    assert_close("final_state", got.final_state, expected[1], inputs["q"].dtype)


@pytest.mark.parametrize(
    ("dtype", "l2norm", "g"),
    [
        (torch.float16, False, -4.9),
        (torch.float16, False, -5.1),
        (torch.bfloat16, False, -4.9),
        (torch.bfloat16, False, -5.1),
        (torch.bfloat16, True, -4.3),
        (torch.bfloat16, True, -4.4),
        (torch.bfloat16, True, -4.9),
        (torch.bfloat16, True, -5.4),
        (torch.bfloat16, False, -2.7),
        (torch.bfloat16, False, -2.9),
    ],
    ids=str,
)
def test_decays_around_the_range_of_one_product(
    dtype: torch.dtype, l2norm: bool, g: float, device: str
) -> None:
    """Backward, and forward in float16, take pairs of 16 tokens in one product while decays from
    their middle are within e^40. Forward in bfloat16 takes pairs of 32 tokens, within 2^122 for
    rows of norm 1 under the L2 norm, and within 2^64 without it."""
    case = Case(
        "range", T=64, H=1, HV=1, K=64, V=64, per_channel=True, l2norm=l2norm, dtype=dtype
    )  # fmt: skip

    leaves = with_gradients(inputs_with_gates(case, g, device))
    exact = with_gradients(inputs_with_gates(case, g, "cpu"), torch.float64)
    got, expected = gdn.gated_delta_net(**leaves, backend="triton"), run_definition(exact)
    found = gradients(got, leaves, make_output_gradients(case, device))
    true = gradients(expected, exact, make_output_gradients(case))
    for name, value in {"o": got.o, **found}.items():
        assert_close(name, value, {"o": expected[0], **true}[name], dtype)


@pytest.mark.parametrize("size", [2.0**36, 2.0**-60, 2.0**-80], ids=["large", "tiny", "tiniest"])
def test_raw_rows_at_a_lower_bound(size: float, device: str) -> None:
    """Elements of q times decays of 2^115 leave float32's range. k of the token before a query is
    what the query reads, so that decays of neighbours matter."""
    case = Case(
        "raw", T=70, H=1, HV=1, per_channel=True, fused=True, gates="strong",
        gate_lower_bound=-5.0, initial_state=False, dtype=torch.bfloat16,
    )  # fmt: skip
    given = make_inputs(case)
    k = F.normalize(given["k"].float(), dim=-1)
    before = k.roll(1, dims=1)
    q = size * F.normalize(before - (before * k).sum(-1, keepdim=True) * k, dim=-1)
    rows = {"q": q.to(case.dtype), "k": k.to(case.dtype)}

    def raw(device: str) -> Inputs:
        moved = {name: x.to(device) for name, x in rows.items()}
        return make_inputs(case, device) | moved | {"use_qk_l2norm_in_kernel": False}

    check_forward(raw, device, size)


SIZES = [2.0**40, 2.0**20, 2.0**12, 2.0**-8, 2.0**-16, 2.0**-40]


@pytest.mark.parametrize(
    ("g", "size"),
    [
        *((g, size) for g in (None, -4.9) for size in SIZES),
        *((g, size) for g in (-4.3, -5.0) for size in (2.0**24, 2.0**-16)),
    ],
)
def test_long_and_short_rows_under_the_norm(g: float | None, size: float, device: str) -> None:
    """The products take rows before the L2 norm, beside decays of 2^115 on both sides of a middle,
    or by levels where rows are too long or too short for that. Every other channel decays by g a
    token, or every gate is at a bound of -5 (None)."""
    case = Case(
        "long", T=70, H=1, HV=1, K=64, V=64, per_channel=True, dtype=torch.bfloat16, l2norm=True
    )
    if g is None:
        case = replace(case, fused=True, gates="strong", gate_lower_bound=-5.0)

    def scaled(device: str) -> Inputs:
        given = make_inputs(case, device) if g is None else inputs_with_gates(case, g, device)
        return given | {name: size * given[name] for name in ("q", "k")}

    check_forward(scaled, device)


def test_sums_after_resets(device: str) -> None:
    """31 resets, and then gates so small that a sum with the resets in float32 loses them. What
    token 31 wrote decays by them all the same until token 63 reads it."""
    case = Case(
        "resets", T=64, H=1, HV=1, per_channel=True, initial_state=False, dtype=torch.bfloat16
    )  # fmt: skip

    def with_resets(device: str) -> Inputs:
        given = make_inputs(case, device)
        given["q"], given["k"] = (torch.full_like(given[name], 0.125) for name in ("q", "k"))
        given["v"] = torch.ones_like(given["v"])
        given["beta"] = (torch.arange(64, device=device) == 31).float()[None, :, None]
        given["g"][:] = torch.linspace(-8.4e-5, -8.0e-5, case.K, device=device)
        given["g"][:, :31] = -float("inf")
        return given

    got = gdn.gated_delta_net(**with_resets(device), backend="triton").o[0, -1, 0]
    expected = run_definition(with_resets("cpu"))[0][0, -1, 0]
    torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=2.0**-9, atol=0)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
@pytest.mark.parametrize("K", [64, 96])
@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("strong", [False, True])
def test_levels_are_computed_only_where_gates_are_strong(
    monkeypatch: pytest.MonkeyPatch, strong: bool, bound: float | None, K: int
) -> None:
    """Weak gates fit one product, and so do any with a bound of -5. With this A_log a channel past
    K, whose g counts as 0, would be strong."""
    from gdn.backends.triton import channel_forward

    levels: list[str] = []
    monkeypatch.setattr(channel_forward, "multiply_levels", lambda *args: levels.append("computed"))
    case = Case(
        "levels", T=64, H=1, HV=1, K=K, per_channel=True, fused=True, gate_lower_bound=bound,
        dtype=torch.bfloat16,
    )  # fmt: skip
    given = make_inputs(case)
    given["A_log"][:] = 3.0
    given["g"] += 5.0 if strong else -15.0
    gdn.gated_delta_net(**given, backend="triton")
    assert bool(levels) is (strong and bound is None)
