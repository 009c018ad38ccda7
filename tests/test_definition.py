"""The definition against hand-computed numbers, textbook formulas and numerical gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import gdn
from gdn.definition import l2_normalize, log_decay, write_strength
from gdn.testing import CASES, Case, make_inputs, run_definition, with_gradients


def scalar(*values: float) -> torch.Tensor:
    """One head of size 1: [1, T, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def test_two_tokens_by_hand() -> None:
    """First token: S = 2 decays to 1; error 3 - 2 * 1 = 1, u = 0.5; S = 1 + 2 * 0.5 = 2;
    o = 2 * (0.5 * 4) = 4."""
    o, state = run_definition(
        {
            "q": scalar(4.0, 1.0),
            "k": scalar(2.0, -1.0),
            "v": scalar(3.0, 1.0),
            "g": torch.tensor([[[math.log(0.5)], [0.0]]], dtype=torch.float64),
            "beta": torch.tensor([[[0.5], [1.0]]], dtype=torch.float64),
            "initial_state": torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64),
            "scale": 0.5,
        }
    )
    # second token: error 1 - (-1 * 2) = 3, u = 3, S = 2 - 3 = -1, o = -1 * 0.5
    torch.testing.assert_close(o.flatten(), torch.tensor([4.0, -0.5], dtype=torch.float64))
    assert state.item() == pytest.approx(-1.0)


def test_orthonormal_keys_make_an_associative_memory() -> None:
    """With beta = 1 and no decay, writing v under orthonormal keys and reading returns v."""
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0].view(1, 8, 1, 8)
    v = torch.randn(1, 8, 1, 5, dtype=torch.float64)
    gates = torch.zeros(1, 8, 1, dtype=torch.float64)
    inputs = {"q": keys, "k": keys, "v": v, "g": gates, "beta": gates + 1, "scale": 1.0}
    o, state = run_definition(inputs)
    torch.testing.assert_close(o, v)
    torch.testing.assert_close(keys[0, :, 0] @ state[0, 0], v[0, :, 0])


def test_fused_activations_equal_the_textbook_formulas() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(l2_normalize(x), F.normalize(x, dim=-1), atol=1e-5, rtol=1e-5)
    assert l2_normalize(torch.zeros(4)).tolist() == [0.0] * 4
    A_log, dt_bias = torch.randn(5).double(), torch.randn(5).double()
    expected = -A_log.exp() * torch.log1p((x + dt_bias).exp())
    torch.testing.assert_close(log_decay(x, A_log, dt_bias), expected)
    torch.testing.assert_close(log_decay(x, A_log, None), -A_log.exp() * torch.log1p(x.exp()))
    torch.testing.assert_close(write_strength(x, False), 1 / (1 + (-x).exp()))
    assert write_strength(torch.tensor(50.0), True).item() == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["grouped-heads-v-first", "packed-v-first-fused"])
def test_is_differentiable_twice(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    lengths = None if case.lengths is None else (2, 0, 3)
    case = replace(case, T=4, lengths=lengths, K=3, V=2, dtype=torch.float64)
    inputs = with_gradients(make_inputs(case))
    names = [n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return run_definition(inputs | dict(zip(names, values, strict=True)))

    values = [inputs[n] for n in names]
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values, atol=1e-4)


def test_inputs_have_the_properties_that_cases_promise() -> None:
    keys = make_inputs(Case("cosine", T=256, cosine=0.9))["k"][0, :, 0]
    cosines = (keys @ keys.T)[torch.ones(256, 256).tril(-1).bool()]
    assert cosines.mean().item() == pytest.approx(0.9, abs=0.03)
    assert (make_inputs(Case("none", T=9, gates="none"))["g"] == 0).all()
    assert (make_inputs(Case("strong", T=9, gates="strong"))["g"] <= -10).all()
    assert (make_inputs(Case("weak", T=9, gates="weak"))["g"] > -0.01).all()


def test_gates_of_a_new_layer() -> None:
    """Those of `gdn.nn` and of the "fast" cases: A in (0.01, 16) and dt_bias = 1."""
    inputs = make_inputs(Case("fast", T=50, HV=64, gates="fast", fused=True))
    layer = gdn.nn.GatedDeltaNet(16, num_k_heads=2, num_v_heads=64, head_k_dim=4, head_v_dim=4)
    for A_log, dt_bias in ((inputs["A_log"], inputs["dt_bias"]), (layer.A_log, layer.dt_bias)):
        assert 0.01 <= A_log.exp().min() < 2 < 14 < A_log.exp().max() <= 16
        assert (dt_bias == 1).all()
    g = make_inputs(Case("fast", T=50, HV=64, gates="fast"))["g"]
    assert -13 < g.mean() < -8
