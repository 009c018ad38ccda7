"""Random decode steps on every backend against the definition: packed and dense, one slot per
sequence or per token, skipped rows, padded pools, strided tensors, both layouts, all dtypes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support import assert_close, capabilities_of, require

import gdn
from gdn.testing.decode import StepCase, copy_pool, make_step, run_step_definition

HEAD_DIMS = ((64, 64), (64, 128), (128, 64), (20, 36), (16, 16))


def draw(seed: int, backend: str) -> tuple[StepCase, random.Random]:
    """A random case that the backend claims."""
    rng = random.Random(seed)
    claims = capabilities_of(backend)
    dims = [(K, V) for K, V in HEAD_DIMS if not claims.head_dims or {K, V} <= {*claims.head_dims}]
    K, V = rng.choice(dims)
    packed, T, N = rng.random() < 0.5, rng.randint(1, 3), rng.randint(1, 4)
    lengths = tuple(rng.randint(0, 3) for _ in range(N)) if packed else None
    H = rng.randint(1, 2)
    kinds = ["own", "one", "each"] if claims.speculative else ["own", "one"]
    dtype = rng.choice([d for d in claims.dtypes if d != torch.float64])
    pool = rng.choice([d for d in claims.decode if d != torch.float64])
    case = StepCase(
        "random", B=1 if packed else N, T=T, lengths=lengths, H=H, HV=H * rng.randint(1, 2), K=K,
        V=V, dtype=dtype, pool=pool, slots=rng.choice(kinds), padding=rng.choice([0, 0, 8, 3]),
        null_index=rng.choice([-1, -1, 0]), fused=rng.random() < 0.5,
        state_v_first=rng.random() < 0.5,
    )  # fmt: skip
    return case, rng


def narrowed(inputs: dict[str, Any], rng: random.Random) -> None:
    """Cut state_indices to fewer columns than tokens, at least the one that is read. Packed steps
    allow that."""
    columns = rng.randint(1, inputs["state_indices"].shape[1])
    inputs["state_indices"] = inputs["state_indices"][:, :columns]
    inputs["num_accepted_tokens"] = inputs["num_accepted_tokens"] % columns


def beside_nan(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as every second element of a wider tensor; the others are NaN or 10^6."""
    filler = torch.full_like(x, torch.nan) if x.is_floating_point() else torch.full_like(x, 10**6)
    return torch.stack([filler, x], -1)[..., 1]


def unusual(inputs: dict[str, Any], rng: random.Random) -> None:
    """Put in slots outside the pool and counts outside the table. On a GPU both skip the row."""
    table, slots = inputs["state_indices"], inputs["state"].shape[0]
    rows = table if table.dim() == 2 else table[:, None]
    rows[rng.randrange(len(rows))] = rng.choice([slots, slots + 5, -2, 10**6])
    if "num_accepted_tokens" in inputs:
        count = inputs["num_accepted_tokens"]
        count[rng.randrange(len(count))] = rng.choice([table.shape[1], table.shape[1] + 3, -1])


@pytest.mark.parametrize("seed", range(16))
def test_random_steps(backend: str, device: str, seed: int) -> None:
    if not capabilities_of(backend).decode:
        pytest.skip("no decode")
    case, rng = draw(seed, backend)
    inputs = make_step(case, "cpu", seed=seed)
    if case.slots == "each" and case.lengths is not None:
        narrowed(inputs, rng)
    if device == "cuda" and case.slots != "own" and rng.random() < 0.5:
        unusual(inputs, rng)
    if rng.random() < 0.5:
        wide = rng.choice([torch.int32, torch.int64])
        for name in ("state_indices", "num_accepted_tokens", "cu_seqlens"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name].to(wide)
    expected_o, expected = run_step_definition(inputs)
    given = {n: x.to(device) if torch.is_tensor(x) else x for n, x in inputs.items()}
    given["state"] = copy_pool(inputs["state"], device)
    for name in ("q", "k", "v", "g", "beta", "state_indices", "num_accepted_tokens", "A_log"):
        if given.get(name) is not None and rng.random() < 0.3:
            given[name] = beside_nan(given[name])
    before = given["state"].clone()
    require(backend, given)
    o = gdn.gated_delta_net_decode(**given, backend=backend)
    assert_close("o", o, expected_o, case.dtype)
    after = given["state"].double().cpu()
    untouched = (expected == before.double().cpu()).flatten(1).all(1)
    assert torch.equal(after[untouched], before.double().cpu()[untouched])
    assert_close("state", after[~untouched], expected[~untouched], case.pool)
