"""A decay per channel, on every backend that claims it: properties, lengths around the blocks of a
chunk, and the gradient of each channel's gate."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TOKENS, assert_close, close, cut, may_fail_with_fla, require
from torch import Tensor

import gdn
from gdn.testing import (
    Case,
    gradients,
    make_inputs,
    make_output_gradients,
    relative_error,
    run_definition,
    with_gradients,
)

GATES = ("none", "weak", "mixed", "strong", "resets")
BASE = Case("channels", T=70, B=2, H=1, HV=2, K=24, V=40, per_channel=True)


@pytest.fixture
def case(dtype: torch.dtype) -> Case:
    return replace(BASE, dtype=dtype)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 63, 64, 65])
def test_lengths_around_the_blocks(
    request: pytest.FixtureRequest, backend: str, device: str, dtype: torch.dtype, T: int
) -> None:
    """Outputs and all gradients, with channels that never decay beside others that do at once."""
    if T in (63, 64):
        may_fail_with_fla(request, backend, device)
    case = Case("length", T=T, HV=4, K=12, V=20, per_channel=True, dtype=dtype)
    inputs = with_gradients(make_inputs(case, device))
    require(backend, inputs)
    into = make_output_gradients(case, device)
    got = gdn.gated_delta_net(**inputs, backend=backend)
    exact = with_gradients(make_inputs(case), torch.float64)
    expected = run_definition(exact)
    assert_close("o", got.o, expected[0], dtype)
    assert_close("final_state", got.final_state, expected[1], dtype)
    found, true = gradients(got, inputs, into), gradients(expected, exact, into)
    for name, value in found.items():
        assert_close(name, value, true[name], dtype)


@pytest.mark.parametrize("gates", GATES)
def test_the_gradient_of_every_channel(device: str, gates: Any) -> None:
    """dg of the torch backend is right to float32's precision in each channel by itself, however
    small it is there: no channel's error hides behind another's gradient."""
    case = replace(BASE, gates=gates, cosine=0.5)
    inputs = with_gradients(make_inputs(case, device))
    exact = with_gradients(make_inputs(case), torch.float64)
    into = make_output_gradients(case, device)
    dg = gradients(gdn.gated_delta_net(**inputs, backend="torch"), inputs, into)["g"].double().cpu()
    true = gradients(run_definition(exact), exact, make_output_gradients(case))["g"]
    sizes = true.norm(dim=1)  # [B, HV, K], over the tokens
    assert sizes.min() > 0
    errors = (dg - true).norm(dim=1) / sizes
    assert errors.max() <= 2e-5, (
        f"{errors.max():.1e} where |dg| is {sizes.flatten()[errors.argmax()]:.1e}"
    )
    assert not dg[make_inputs(case)["g"] < -150].any()


def test_equal_channels_are_one_decay_per_head(backend: str, device: str, case: Case) -> None:
    """The other algorithm of the same backend gives the same, gradients included; dg is the sum of
    the channels'."""
    scalar = make_inputs(replace(case, per_channel=False), device)
    equal = scalar | {"g": scalar["g"][..., None].expand(-1, -1, -1, case.K).contiguous()}
    require(backend, equal)
    found = []
    for inputs in (with_gradients(scalar), with_gradients(equal)):
        outputs = gdn.gated_delta_net(**inputs, backend=backend)
        grads = gradients(outputs, inputs, make_output_gradients(case, device))
        found.append({"o": outputs.o, "final_state": outputs.final_state} | grads)
    found[1]["g"] = found[1]["g"].sum(-1)
    for name, value in found[0].items():
        close(found[1][name], value, case.dtype)


@pytest.mark.parametrize("split", [1, 16, 64])
def test_two_calls_chained_by_the_state_equal_one(
    backend: str, device: str, case: Case, split: int
) -> None:
    inputs = make_inputs(case, device)
    require(backend, inputs)
    whole = gdn.gated_delta_net(**inputs, backend=backend)
    first = gdn.gated_delta_net(**cut(inputs, 0, split), backend=backend)
    rest = cut(inputs, split, case.T, initial_state=first.final_state)
    second = gdn.gated_delta_net(**rest, backend=backend)
    close(torch.cat([first.o, second.o], 1), whole.o, case.dtype)
    close(second.final_state, whole.final_state, case.dtype)


def test_without_writing_each_channel_of_the_state_only_decays(
    backend: str, device: str, case: Case
) -> None:
    inputs = make_inputs(case, device)
    inputs["beta"] = torch.zeros_like(inputs["beta"])
    require(backend, inputs)
    got = gdn.gated_delta_net(**inputs, backend=backend)
    decay = inputs["g"].double().cumsum(1).exp()  # [B, T, HV, K]
    state = inputs["initial_state"].double()
    close(got.final_state, decay[:, -1, :, :, None] * state, case.dtype)
    q = inputs["q"].double().repeat_interleave(2, 2) * case.K**-0.5
    close(got.o, torch.einsum("bthk,bhkv->bthv", q * decay, state), case.dtype)


def test_a_batch_slot_depends_on_itself_alone(backend: str, device: str, case: Case) -> None:
    inputs = make_inputs(case, device)
    require(backend, inputs)
    before = gdn.gated_delta_net(**inputs, backend=backend)
    other = make_inputs(case, device, seed=9)
    for name in (*TOKENS, "initial_state"):
        other[name][1] = inputs[name][1]
    after = gdn.gated_delta_net(**other, backend=backend)
    assert torch.equal(before.o[1], after.o[1])
    assert torch.equal(before.final_state[1], after.final_state[1])
    assert not torch.equal(before.o[0], after.o[0])


def test_is_linear_in_v_from_a_zero_state(backend: str, device: str, case: Case) -> None:
    inputs = make_inputs(case, device) | {"initial_state": None}
    require(backend, inputs)
    other = make_inputs(case, device, seed=5)["v"]

    def out(v: Tensor) -> Tensor:
        return gdn.gated_delta_net(**inputs | {"v": v}, backend=backend).o

    close(out(2 * inputs["v"] - 3 * other), 2 * out(inputs["v"]) - 3 * out(other), case.dtype)


def test_repeated_runs_and_strided_inputs_are_bit_equal(
    backend: str, device: str, case: Case
) -> None:
    inputs = with_gradients(make_inputs(case, device))
    require(backend, inputs)
    strided = {
        name: torch.stack([x, x + 1], -1)[..., 0].detach().requires_grad_()
        if isinstance(x, Tensor)
        else x
        for name, x in inputs.items()
    }

    def once(inputs: dict[str, Any]) -> list[Tensor]:
        o, state = gdn.gated_delta_net(**inputs, backend=backend)
        leaves = [inputs[name] for name in (*TOKENS, "initial_state")]
        return [o, state, *torch.autograd.grad(o.sum() + state.sum(), leaves)]

    first = once(inputs)
    junk = torch.full((10**6,), torch.nan, device=device)  # NaN in memory that later calls may get
    del junk
    for again in (once(inputs), once(strided)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nan_stays_in_its_sequence(backend: str, device: str, dtype: torch.dtype) -> None:
    case = Case("nan", lengths=(70, 3, 65), K=16, V=16, per_channel=True, dtype=dtype)
    inputs = make_inputs(case, device)
    require(backend, inputs)
    clean = gdn.gated_delta_net(**inputs, backend=backend)
    inputs["g"][:, 71] = torch.nan
    got = gdn.gated_delta_net(**inputs, backend=backend)
    assert got.o[:, 71:73].isnan().any()
    for start, end in ((0, 70), (73, 138)):
        assert torch.equal(got.o[:, start:end], clean.o[:, start:end])


def test_prefill_then_decode_equals_prefill(backend: str, device: str, dtype: torch.dtype) -> None:
    """The final state of a prefill serves as the pool; with a lower bound and a flat dt_bias."""
    case = Case(
        "decode", T=38, B=2, HV=4, K=32, V=16, fused=True, per_channel=True, gate_lower_bound=-5.0
    )
    inputs = make_inputs(replace(case, dtype=dtype), device)
    bound = inputs.pop("gate_lower_bound")
    inputs["dt_bias"] = inputs["dt_bias"].flatten()
    require(backend, inputs | {"gate_lower_bound": bound})
    whole = gdn.kimi_delta_attention(**inputs, lower_bound=bound, backend=backend)
    head = gdn.kimi_delta_attention(**cut(inputs, 0, 32), lower_bound=bound, backend=backend)
    options = {n: x for n, x in inputs.items() if "state" not in n}
    outputs = []
    for t in range(32, 38, 2):
        o = gdn.kimi_delta_attention_decode(
            **cut(options, t, t + 2), lower_bound=bound, state=head.final_state, backend=backend
        )
        outputs.append(o)
    close(torch.cat(outputs, 1), whole.o[:, 32:], dtype)
    close(head.final_state, whole.final_state, dtype)


@pytest.mark.parametrize("per_channel", [False, True], ids=["head", "channel"])
def test_a_lower_bound_without_A_log(
    request: pytest.FixtureRequest, backend: str, device: str, dtype: torch.dtype, per_channel: bool
) -> None:
    """A_log = 0; and raw gates of -inf, 1e4 and 1e38 have finite gradients."""
    if per_channel:  # its gradient of A_log is NaN with such gates
        may_fail_with_fla(request, backend, device)
    case = Case("bound", T=40, HV=4, K=8, V=8, fused=True, gate_lower_bound=-5.0)
    case = replace(case, per_channel=per_channel, dtype=dtype)
    given = make_inputs(case, device)
    given["g"][:, 10], given["g"][:, 20], given["g"][:, 30] = -torch.inf, 1e4, 1e38
    found = []
    for A_log in (None, torch.zeros_like(given["A_log"])):
        inputs = with_gradients(given | {"A_log": A_log})
        require(backend, inputs)
        outputs = gdn.gated_delta_net(**inputs, backend=backend)
        grads = gradients(outputs, inputs, make_output_gradients(case, device))
        found.append({"o": outputs.o, "final_state": outputs.final_state} | grads)
    assert found[1].pop("A_log").isfinite().all()
    assert set(found[0]) == set(found[1])
    assert "dt_bias" in found[0]
    for name, value in found[0].items():
        assert value.isfinite().all(), name
        close(value, found[1][name], case.dtype)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    group=st.integers(1, 3),
    K=st.integers(1, 20),
    V=st.integers(1, 20),
    fused=st.booleans(),
    bound=st.none() | st.floats(-20, -0.1),
    seed=st.integers(0, 2**31),
)
def test_torch_packed_equals_one_by_one(
    lengths: list[int],
    group: int,
    K: int,
    V: int,
    fused: bool,
    bound: float | None,
    seed: int,
) -> None:
    """With gradients, at any sizes."""
    case = Case(
        "ragged", lengths=tuple(lengths), HV=2 * group, K=K, V=V, fused=fused, per_channel=True,
        gate_lower_bound=bound if fused else None, dtype=torch.float64,
    )  # fmt: skip
    inputs = with_gradients(make_inputs(case, seed=seed))
    bounds = inputs["cu_seqlens"].tolist()
    packed = gdn.gated_delta_net(**inputs, backend="torch")
    into = make_output_gradients(case)
    together = gradients(packed, inputs, into)
    apart = {name: torch.zeros_like(x) for name, x in together.items()}
    del inputs["cu_seqlens"]
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = inputs["initial_state"][n : n + 1].detach().requires_grad_()
        alone = {name: inputs[name][:, start:end].detach().requires_grad_() for name in TOKENS}
        alone = inputs | alone | {"initial_state": state}
        got = gdn.gated_delta_net(**alone, backend="torch")
        close(packed.o[:, start:end], got.o, torch.float64)
        close(packed.final_state[n : n + 1], got.final_state, torch.float64)
        for name, x in gradients(got, alone, (into[0][:, start:end], into[1][n : n + 1])).items():
            if name in TOKENS:
                apart[name][:, start:end] = x
            elif name == "initial_state":
                apart[name][n : n + 1] = x
            else:
                apart[name] += x
    for name, x in together.items():
        close(x, apart[name], torch.float64)


def test_float64_is_exact_at_strong_and_infinite_gates(device: str) -> None:
    """The form of the torch backend neither divides nor subtracts sums of gates."""
    for gates in ("strong", "resets"):
        case = replace(BASE, gates=gates, dtype=torch.float64)
        inputs = make_inputs(case, device)
        got, expected = gdn.gated_delta_net(**inputs, backend="torch"), run_definition(inputs)
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) <= 1e-14
