"""Rare but well-formed inputs: views that PyTorch materialises before an op reads them, lengths
that change in place, counts and slots out of range, gates that reset the state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import assert_close, capabilities_of, require

import gdn
from gdn import dispatch
from gdn.problem import DIFFERENTIABLE
from gdn.testing import Case, make_inputs, with_gradients
from gdn.testing.decode import StepCase, as_step, copy_pool, make_step

DENSE = Case("views", T=5, H=1, fused=True)
STEP = StepCase("views", B=2, H=1, fused=True)


def negated(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a view whose elements are negated when they are read."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


@pytest.mark.parametrize("needs_grad", [False, True])
def test_negated_views_of_every_input(
    backend: str, device: str, dtype: torch.dtype, needs_grad: bool
) -> None:
    inputs = make_inputs(replace(DENSE, dtype=dtype), device)
    if needs_grad:
        inputs["v"].requires_grad_()
    require(backend, inputs)
    expected = gdn.gated_delta_net(**inputs, backend=backend)
    for name in DIFFERENTIABLE:
        got = gdn.gated_delta_net(**inputs | {name: negated(inputs[name])}, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name


def test_imaginary_part_of_a_conjugate(backend: str, device: str) -> None:
    inputs = make_inputs(replace(DENSE, dtype=torch.float32), device)
    require(backend, inputs)
    z = torch.complex(inputs["q"], inputs["k"])
    views = {"q": z.real, "k": (-z).conj().imag}
    assert views["k"].is_neg()
    expected = gdn.gated_delta_net(**inputs, backend=backend)
    assert torch.equal(gdn.gated_delta_net(**inputs | views, backend=backend).o, expected.o)


def test_negated_views_in_decode(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_step(replace(STEP, dtype=dtype), device)
    require(backend, inputs)
    pool = copy_pool(inputs["state"])
    expected = gdn.gated_delta_net_decode(**inputs | {"state": pool}, backend=backend)
    for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias"):
        again = inputs | {"state": copy_pool(inputs["state"])}
        again[name] = negated(again[name])
        o = gdn.gated_delta_net_decode(**again, backend=backend)
        assert torch.equal(o, expected), name
        assert torch.equal(again["state"], pool), name
    with pytest.raises(ValueError, match="state must not be a view that negates"):
        gdn.gated_delta_net_decode(**inputs | {"state": negated(pool)}, backend=backend)


def test_lengths_that_change_in_place(backend: str, device: str, dtype: torch.dtype) -> None:
    """cu_seqlens changes between two calls with the same tensor, also with gradients."""
    case = Case("lengths", lengths=(64, 192), H=1, HV=1, dtype=dtype)
    inputs = make_inputs(case, device)
    require(backend, inputs)
    for kwargs in (inputs, with_gradients(inputs)):
        kwargs["cu_seqlens"] = inputs["cu_seqlens"].clone()
        gdn.gated_delta_net(**kwargs, backend=backend)
        kwargs["cu_seqlens"][1] = 192
        fresh = kwargs | {"cu_seqlens": kwargs["cu_seqlens"].clone()}
        got, expected = (gdn.gated_delta_net(**x, backend=backend) for x in (kwargs, fresh))
        assert torch.equal(got.o, expected.o)
        assert torch.equal(got.final_state, expected.final_state)


@pytest.mark.parametrize("count", [-1, 3, 4, 2**20])
def test_counts_past_the_table_skip_the_row(
    backend: str, device: str, dtype: torch.dtype, count: int
) -> None:
    """As on a GPU, where values are not checked: the kernel is called without the checks. The rows
    before and after are live, so that reading past a row's ends would find their slots."""
    case = StepCase("counts", B=3, T=2, HV=4, slots="each", full=True, dtype=dtype)
    inputs = make_step(case, device)
    require(backend, inputs)
    expected = copy_pool(inputs["state"])
    names = ("q", "k", "v", "g", "beta", "state_indices", "num_accepted_tokens")
    others = {name: inputs[name][[0, 2]] for name in names}
    right = gdn.gated_delta_net_decode(**inputs | others | {"state": expected}, backend=backend)
    inputs["num_accepted_tokens"][1] = count
    step = as_step(inputs)
    o = dispatch.choose_for_pool(backend, step).plan.decode(step)
    assert not o[1].any()
    assert_close("o", o[[0, 2]], right, dtype)
    assert_close("state", inputs["state"], expected, torch.float32)
    skipped = inputs["state_indices"][1].long()
    assert torch.equal(inputs["state"][skipped], expected[skipped])


def test_a_reset_drops_all_earlier_tokens(backend: str, device: str, dtype: torch.dtype) -> None:
    """After a gate of -inf, prefill equals a prefill that starts there; decode agrees."""
    if not capabilities_of(backend).resets:
        pytest.skip("does not claim resets")
    case = Case("reset", T=100, H=1, dtype=dtype, gates="weak")
    inputs = with_gradients(make_inputs(case, device))
    require(backend, inputs)
    with torch.no_grad():
        inputs["g"][:, 70] = -torch.inf
    o, state = gdn.gated_delta_net(**inputs, backend=backend)
    tokens = ("q", "k", "v", "g", "beta")
    after = {n: inputs[n][:, 70:].detach() for n in tokens}
    zero = {"initial_state": torch.zeros_like(inputs["initial_state"])}
    alone = gdn.gated_delta_net(**inputs | after | zero, backend=backend)
    assert_close("o", o[:, 70:].detach(), alone.o, dtype)
    assert_close("state", state.detach(), alone.final_state, dtype)
    leaves: list[Any] = [inputs[n] for n in (*tokens, "initial_state")]
    grads = torch.autograd.grad(state.sum(), leaves)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[3][:, 70].any()
    assert grads[3][:, :70].abs().max() < 1e-4  # only rounding
    assert not grads[5].any()
    if capabilities_of(backend).decode:
        pool = inputs["initial_state"].detach().float().clone()
        step = {n: inputs[n][:, 70:71].detach() for n in tokens}
        out = gdn.gated_delta_net_decode(**step, state=pool, backend=backend)
        assert_close("decode", out, o[:, 70:71].detach(), dtype)


@pytest.mark.parametrize("low", ["v", "qk", "q"])
def test_mixed_dtypes_are_computed_in_that_of_v(backend: str, device: str, low: str) -> None:
    """As in fla: q and k are cast to the dtype of v, and o and gradients come back in theirs."""
    inputs = make_inputs(Case("mixed", T=5, H=1, dtype=torch.float32), device)
    mixed = inputs | {name: inputs[name].bfloat16() for name in low}
    expected = inputs | {name: mixed[name].to(mixed["v"].dtype) for name in ("q", "k", "v")}
    require(backend, expected)
    mixed["q"].requires_grad_()
    got = gdn.gated_delta_net(**mixed, backend=backend)
    right = gdn.gated_delta_net(**expected, backend=backend)
    assert got.o.dtype == mixed["v"].dtype
    assert torch.equal(got.o, right.o)
    got.o.sum().backward()
    assert mixed["q"].grad.dtype == mixed["q"].dtype
    assert gdn.explain(**mixed, backend=backend).chosen == backend
