"""gdn.batch_invariant: the same bits alone, in any batch, packed among others, in parts, with fewer
heads, and in any row of a decode batch, on every backend that claims it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import TOKENS, capabilities_of, require, train
from torch import Tensor

import gdn
from gdn.testing import CASES, Case, make_inputs, make_output_gradients
from gdn.testing.cases import Gates
from gdn.testing.check import assert_agrees
from gdn.testing.decode import StepCase, copy_pool, make_step
from gdn.testing.inputs import gradients
from gdn.testing.prefill import PrefillCase, make_prefill

Bits = dict[str, Tensor]
HEAD_DIMS = ((16, 16), (20, 36), (64, 64), (128, 128))
TABLES = (
    "state_indices", "num_accepted_tokens", "fresh", "checkpoint_offsets", "checkpoint_indices",
)  # fmt: skip
GATES: tuple[Gates, ...] = ("mixed", "none", "model", "fast", "resets")


def draw(seed: int, backend: str, device: str) -> Case:
    """A random pack that the backend claims; on a GPU with so many and such long sequences that
    calls outside of the mode are cut and configured in other ways."""
    rng, claims = random.Random(seed), capabilities_of(backend)
    if not claims.batch_invariant:
        pytest.skip("does not claim batch invariance")
    dims = [d for d in HEAD_DIMS if not claims.head_dims or {*d} <= {*claims.head_dims}]
    on_gpu = device == "cuda"
    K, V = rng.choice(dims if on_gpu else dims[:2])
    lengths = (1, 5, 63, 64, 65, 130, *((700, 2000, 9000) if on_gpu else ()))
    count = rng.choice((2, 3, 60, 300) if on_gpu else (2, 3))
    H = rng.choice((2, 4) if on_gpu else (2,))
    packed = [rng.choice(lengths if n < 8 else lengths[:6]) for n in range(count)]
    rng.shuffle(packed)
    return Case(
        "drawn", lengths=tuple(packed), H=H, HV=H * rng.choice((1, 2)), K=K, V=V,
        dtype=rng.choice([d for d in claims.dtypes if on_gpu or d.itemsize > 1]),
        gates=rng.choice(GATES), fused=rng.random() < 0.5, state_v_first=rng.random() < 0.5,
        per_channel=claims.per_channel and rng.random() < 0.3,
    )  # fmt: skip


def compute(backend: str, inputs: dict[str, Any], into: tuple[Tensor, ...]) -> Bits:
    """Outputs and gradients of a batch-invariant call. Those of A_log and dt_bias are sums over the
    batch."""
    with gdn.batch_invariant():
        outputs = gdn.gated_delta_net(**inputs, backend=backend)
    found: Bits = {"o": outputs.o.detach()}
    assert outputs.final_state is not None
    found["final_state"] = outputs.final_state.detach()
    if outputs.o.requires_grad:  # outside of the mode: backward takes forward's
        found |= gradients(tuple(outputs), inputs, into)
    return {n: x for n, x in found.items() if n not in ("A_log", "dt_bias")}


def take(inputs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Inputs with changes, in new tensors that require grad where those before did."""
    return {
        n: x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x
        for n, x in (inputs | changes).items()
    }


def assert_same_bits(got: Bits, whole: Bits, n: int, first: int, last: int, what: str) -> None:
    """The results of sequence n alone are those that it has in the pack."""
    for name, x in got.items():
        per_token = name in ("o", *TOKENS)
        expected = whole[name][:, first:last] if per_token else whole[name][n : n + 1]
        assert torch.equal(x.nan_to_num(7), expected.nan_to_num(7)), f"{name} {what}"


@pytest.mark.parametrize("seed", range(12))
def test_a_sequence_has_the_same_bits_alone_and_in_company(
    backend: str, device: str, seed: int
) -> None:
    case = draw(seed, backend, device)
    rng = random.Random(seed)
    inputs = make_inputs(case, device, seed) | {"output_final_state": True}
    require(backend, inputs)
    if seed % 2:
        inputs = train(backend, inputs)
    do, dS = make_output_gradients(case, device)
    whole = compute(backend, inputs, (do, dS))
    bounds = inputs["cu_seqlens"].tolist()
    assert case.lengths is not None
    for n in rng.sample(range(case.sequences), min(case.sequences, 4)):
        first, last = bounds[n : n + 2]
        own = {name: inputs[name][:, first:last] for name in TOKENS}
        own["initial_state"] = inputs["initial_state"][n : n + 1]
        into = do[:, first:last], dS[n : n + 1]
        alone = take(inputs, **own, cu_seqlens=None)
        assert_same_bits(compute(backend, alone, into), whole, n, first, last, "alone")
        packed = take(inputs, **own, cu_seqlens=torch.tensor([0, last - first], device=device))
        assert_same_bits(compute(backend, packed, into), whole, n, first, last, "in a pack of one")

        H, HV = case.H // 2, case.HV // 2  # the first half of the heads, as one of two ranks has it
        half = {m: x[:, :, : H if m in "qk" else HV] for m, x in own.items() if m in TOKENS}
        half["initial_state"] = own["initial_state"][:, :HV]
        half |= {m: inputs[m][:HV] for m in ("A_log", "dt_bias") if inputs.get(m) is not None}
        into = into[0][:, :, :HV], into[1][:, :HV]
        got = compute(backend, take(inputs, **half, cu_seqlens=None), into)
        for name, x in got.items():
            heads = H if name in "qk" else HV
            full = whole[name][:, first:last] if name in ("o", *TOKENS) else whole[name][n : n + 1]
            expected = full[:, :heads] if name in ("initial_state", "final_state") else None
            expected = full[:, :, :heads] if expected is None else expected
            assert torch.equal(x.nan_to_num(7), expected.nan_to_num(7)), f"{name} of half the heads"


@pytest.mark.parametrize("seed", range(6))
def test_a_sequence_has_the_same_bits_in_parts(backend: str, device: str, seed: int) -> None:
    """Each part but the last ends at a multiple of 64, and states between parts are float32."""
    rng, drawn = random.Random(seed), draw(seed, backend, device)
    chunks = rng.choice((5, 40, 130)) if device == "cuda" else 2
    case = Case(
        "parts", T=64 * chunks + rng.choice((1, 30)), B=2, H=drawn.H, HV=drawn.HV, K=drawn.K,
        V=drawn.V, dtype=drawn.dtype, gates=drawn.gates, fused=drawn.fused,
        state_v_first=drawn.state_v_first, per_channel=drawn.per_channel,
    )  # fmt: skip
    inputs = make_inputs(case, device, seed) | {"output_final_state": True}
    require(backend, inputs)
    with gdn.batch_invariant():
        o, final = gdn.gated_delta_net(**inputs, backend=backend)
        ends = sorted(rng.sample(range(1, chunks + 1), min(chunks, 3)))
        parts, state = [], inputs["initial_state"]
        for first, last in zip([0, *ends], [*ends, None], strict=True):
            at = slice(64 * first, None if last is None else 64 * last)
            own = {name: inputs[name][:, at] for name in TOKENS} | {"initial_state": state}
            part, state = gdn.gated_delta_net(**inputs | own, backend=backend)
            parts.append(part)
    assert torch.equal(torch.cat(parts, 1), o)
    assert state is not None
    assert final is not None
    assert torch.equal(state, final)


def misplaced(x: Tensor) -> Tensor:
    """The same numbers, rows apart and off by one number from where a new tensor would be."""
    wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 3)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


@pytest.mark.parametrize("seed", range(4))
def test_strides_and_addresses_do_not_matter(backend: str, device: str, seed: int) -> None:
    """A sequence that is cut out of a pack has other ones than a sequence alone."""
    case = draw(seed, backend, device)
    inputs = make_inputs(case, device, seed) | {"output_final_state": True}
    require(backend, inputs)
    names = [*TOKENS, "initial_state", "A_log", "dt_bias"]
    moved = {n: misplaced(inputs[n]) for n in names if inputs.get(n) is not None}
    with gdn.batch_invariant():
        outputs = gdn.gated_delta_net(**inputs, backend=backend)
        again = gdn.gated_delta_net(**inputs | moved, backend=backend)
    for x, y in zip(outputs, again, strict=True):
        assert x is not None
        assert y is not None
        assert y.is_contiguous()
        assert torch.equal(x, y)


def rows_of(inputs: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """A call on a copy of the pool with these sequences alone, packed."""
    bounds = inputs["cu_seqlens"].tolist()
    spans = [range(bounds[n], bounds[n + 1]) for n in chosen]
    tokens = [t for span in spans for t in span]
    ends = torch.tensor([len(span) for span in spans]).cumsum(0).tolist()
    own = {name: inputs[name][:, tokens] for name in TOKENS}
    own["cu_seqlens"] = torch.tensor([0, *ends], device=inputs["q"].device)
    own |= {name: inputs[name][chosen] for name in TABLES if inputs.get(name) is not None}
    return inputs | own | {"state": copy_pool(inputs["state"], inputs["state"].device)}


def check_rows(op: Any, backend: str, inputs: dict[str, Any], rng: random.Random) -> None:
    """o and slots of some sequences of a call on a pool are what they are in smaller calls."""
    bounds, count = inputs["cu_seqlens"].tolist(), len(inputs["state_indices"])
    whole = rows_of(inputs, list(range(count)))
    with gdn.batch_invariant():
        o = op(**whole, backend=backend)
        for size in (1, min(3, count)):
            chosen = rng.sample(range(count), size)
            few = rows_of(inputs, chosen)
            few |= {name: misplaced(few[name]) for name in TOKENS}
            got = op(**few, backend=backend)
            tokens = [t for n in chosen for t in range(bounds[n], bounds[n + 1])]
            assert torch.equal(got, o[:, tokens])
            before = inputs["state"].nan_to_num(7)
            changed = (few["state"].nan_to_num(7) != before).flatten(1).any(1)
            assert torch.equal(
                few["state"][changed].nan_to_num(7), whole["state"][changed].nan_to_num(7)
            )


@pytest.mark.parametrize("seed", range(6))
def test_a_prefill_on_a_pool_has_the_same_bits(backend: str, device: str, seed: int) -> None:
    drawn, claims, rng = draw(seed, backend, device), capabilities_of(backend), random.Random(seed)
    if not claims.prefill:
        pytest.skip("no prefill on a pool")
    inputs = make_prefill(
        PrefillCase(
            "drawn", lengths=drawn.lengths, H=drawn.H, HV=drawn.HV, K=drawn.K, V=drawn.V,
            dtype=drawn.dtype, gates=drawn.gates, fused=drawn.fused, fresh=rng.random() < 0.5,
            state_v_first=drawn.state_v_first, per_channel=drawn.per_channel,
            pool=rng.choice([d for d in claims.prefill if d != torch.float64]),
            checkpoints="pool" if rng.random() < 0.5 else "none",
        ),
        device, seed=seed,
    )  # fmt: skip
    require(backend, inputs, prefill=True)
    check_rows(gdn.gated_delta_net_prefill, backend, inputs, rng)


@pytest.mark.parametrize("seed", range(12))
def test_a_decode_row_has_the_same_bits(backend: str, device: str, seed: int) -> None:
    drawn, claims, rng = draw(seed, backend, device), capabilities_of(backend), random.Random(seed)
    N = rng.choice((2, 30, 200, 700)) if device == "cuda" else 5
    inputs = make_step(
        StepCase(
            "drawn", lengths=tuple(rng.choice((1, 1, 2, 4)) for _ in range(N)), H=drawn.H,
            HV=drawn.HV, K=drawn.K, V=drawn.V, dtype=drawn.dtype, gates=drawn.gates,
            fused=drawn.fused, state_v_first=drawn.state_v_first, per_channel=drawn.per_channel,
            pool=rng.choice([d for d in claims.decode if d != torch.float64]),
            slots="each" if claims.speculative and rng.random() < 0.3 else "one",
        ),
        device, seed=seed,
    )  # fmt: skip
    require(backend, inputs)
    check_rows(gdn.gated_delta_net_decode, backend, inputs, rng)


@pytest.mark.parametrize("name", ["packed-v-first-fused", "channels-packed-fused"])
def test_agrees_with_the_definition(backend: str, device: str, name: str) -> None:
    """Gradients of A_log and dt_bias too."""
    case = next(case for case in CASES if case.name == name)
    claims = capabilities_of(backend)
    case = replace(case, dtype=claims.dtypes[-1] if backend == "torch" else torch.bfloat16)
    with gdn.batch_invariant():
        inputs = make_inputs(case, device)
        require(backend, inputs)
        assert_agrees(backend, case, train(backend, inputs))
