"""Properties that hold for any inputs, on every backend: the op is compared with itself, without
reference values."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TOKENS, close, cut, require
from torch import Tensor

import gdn
from gdn.testing import Case, make_inputs, with_gradients

T = 150


@pytest.fixture
def case(dtype: torch.dtype) -> Case:
    return Case("property", T=T, HV=4, B=2, dtype=dtype)


@pytest.mark.parametrize("split", [1, 64, 100])
def test_two_calls_chained_by_the_state_equal_one(
    backend: str, device: str, case: Case, split: int
) -> None:
    inputs = make_inputs(case, device)
    require(backend, inputs)
    whole = gdn.gated_delta_net(**inputs, backend=backend)
    first = gdn.gated_delta_net(**cut(inputs, 0, split), backend=backend)
    rest = cut(inputs, split, T, initial_state=first.final_state)
    second = gdn.gated_delta_net(**rest, backend=backend)
    close(torch.cat([first.o, second.o], 1), whole.o, case.dtype)
    close(second.final_state, whole.final_state, case.dtype)


def test_packed_equals_one_by_one(backend: str, device: str, dtype: torch.dtype) -> None:
    case = Case("packed", lengths=(5, 64, 0, 100), HV=4, dtype=dtype)
    inputs = make_inputs(case, device)
    require(backend, inputs)
    packed = gdn.gated_delta_net(**inputs, backend=backend)
    bounds = inputs.pop("cu_seqlens").tolist()
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = inputs["initial_state"][n : n + 1]
        alone = gdn.gated_delta_net(**cut(inputs, start, end, initial_state=state), backend=backend)
        close(packed.o[:, start:end], alone.o, dtype)
        close(packed.final_state[n : n + 1], alone.final_state, dtype)


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


def test_nan_stays_in_its_sequence(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case("nan", lengths=(70, 3, 130), dtype=dtype), device)
    require(backend, inputs)
    clean = gdn.gated_delta_net(**inputs, backend=backend)
    inputs["v"][:, 71] = torch.nan
    got = gdn.gated_delta_net(**inputs, backend=backend)
    assert got.o[:, 71:73].isnan().any()
    for start, end in ((0, 70), (73, 203)):
        assert torch.equal(got.o[:, start:end], clean.o[:, start:end])


def test_without_writing_the_state_only_decays(backend: str, device: str, case: Case) -> None:
    inputs = make_inputs(case, device)
    inputs["beta"] = torch.zeros_like(inputs["beta"])
    require(backend, inputs)
    got = gdn.gated_delta_net(**inputs, backend=backend)
    decay = inputs["g"].double().cumsum(1).exp()
    state = inputs["initial_state"].double()
    close(got.final_state, decay[:, -1, :, None, None] * state, case.dtype)
    q = inputs["q"].double().repeat_interleave(2, 2) * case.K**-0.5
    close(got.o, decay[..., None] * torch.einsum("bthk,bhkv->bthv", q, state), case.dtype)


def test_is_linear_in_v_from_a_zero_state(backend: str, device: str, case: Case) -> None:
    inputs = make_inputs(case, device) | {"initial_state": None}
    require(backend, inputs)
    other = make_inputs(case, device, seed=5)["v"]

    def out(v: Tensor) -> Tensor:
        return gdn.gated_delta_net(**inputs | {"v": v}, backend=backend).o

    close(out(2 * inputs["v"] - 3 * other), 2 * out(inputs["v"]) - 3 * out(other), case.dtype)


def test_repeated_runs_are_bit_equal(backend: str, device: str, case: Case) -> None:
    inputs = with_gradients(make_inputs(case, device))
    require(backend, inputs)
    if not next(i for i in gdn.list_backends() if i.name == backend).capabilities.deterministic:
        pytest.skip("does not claim to be deterministic")

    def once() -> list[Tensor]:
        o, state = gdn.gated_delta_net(**inputs, backend=backend)
        leaves = [inputs[name] for name in (*TOKENS, "initial_state")]
        return [o, state, *torch.autograd.grad(o.sum() + state.sum(), leaves)]

    first = once()
    junk = torch.full((10**6,), torch.nan, device=device)  # NaN in memory that later calls may get
    del junk
    assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_strided_and_expanded_inputs_give_the_same(backend: str, device: str, case: Case) -> None:
    inputs = make_inputs(case, device)
    require(backend, inputs)
    plain = gdn.gated_delta_net(**inputs, backend=backend)
    strided = dict(inputs)
    for name in ("q", "k", "v", "g", "beta", "initial_state"):
        x = inputs[name]
        strided[name] = torch.stack([x, x + 1], -1)[..., 0]
        assert not strided[name].is_contiguous()
    got = gdn.gated_delta_net(**strided, backend=backend)
    assert torch.equal(got.o, plain.o)
    assert torch.equal(got.final_state, plain.final_state)
    expanded = inputs | {name: inputs[name][:1].expand_as(inputs[name]) for name in ("k", "g")}
    expected = gdn.gated_delta_net(
        **inputs | {name: expanded[name].contiguous() for name in ("k", "g")}, backend=backend
    )
    assert torch.equal(gdn.gated_delta_net(**expanded, backend=backend).o, expected.o)


def test_nothing_is_written_to_the_inputs(backend: str, device: str, dtype: torch.dtype) -> None:
    case = Case("packed", lengths=(70, 3), fused=True, dtype=dtype)
    inputs = with_gradients(make_inputs(case, device))
    require(backend, inputs)
    copies = {n: x.detach().clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    o, state = gdn.gated_delta_net(**inputs, backend=backend)
    (o.sum() + state.sum()).backward()
    assert all(torch.equal(inputs[name], copy) for name, copy in copies.items())
    again = gdn.gated_delta_net(**inputs, backend=backend).final_state
    assert again.data_ptr() != inputs["initial_state"].data_ptr()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    group=st.integers(1, 3),
    K=st.integers(1, 20),
    V=st.integers(1, 20),
    fused=st.booleans(),
    v_first=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_torch_packed_equals_padded(
    lengths: list[int], group: int, K: int, V: int, fused: bool, v_first: bool, seed: int
) -> None:
    """Packed sequences equal the same ones as a batch, padded at the end with tokens that change
    nothing."""
    case = Case(
        "ragged",
        lengths=tuple(lengths),
        HV=2 * group,
        K=K,
        V=V,
        fused=fused,
        state_v_first=v_first,
        dtype=torch.float64,
    )
    inputs = make_inputs(case, seed=seed)
    packed = gdn.gated_delta_net(**inputs, backend="torch")
    bounds, T = inputs.pop("cu_seqlens").tolist(), max(lengths)
    padded = dict(inputs)
    idle = {"g": -torch.inf if fused else 0.0, "beta": -torch.inf if fused else 0.0}
    for name in TOKENS:
        rows = inputs[name].new_full(
            (len(lengths), T, *inputs[name].shape[2:]), idle.get(name, 0.0)
        )
        for n, (start, end) in enumerate(itertools.pairwise(bounds)):
            rows[n, : end - start] = inputs[name][0, start:end]
        padded[name] = rows
    dense = gdn.gated_delta_net(**padded, backend="torch")
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        close(dense.o[n, : end - start], packed.o[0, start:end], torch.float64)
    close(dense.final_state, packed.final_state, torch.float64)
