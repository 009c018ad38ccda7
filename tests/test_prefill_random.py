"""Random prefills on a pool of states on every backend against the definition: packed and dense,
skipped, empty and fresh sequences, checkpoints, padded pools and packs, strided tensors and tables,
both layouts, all dtypes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support import capabilities_of, require
from test_decode_random import HEAD_DIMS, beside_nan

import gdn
from gdn.testing.check import assert_prefill_agrees
from gdn.testing.decode import copy_pool
from gdn.testing.prefill import PrefillCase, make_prefill

LENGTHS = (0, 0, 1, 2, 63, 64, 65, 128, 130)


def draw(seed: int, backend: str) -> tuple[PrefillCase, random.Random]:
    """A random case that the backend claims."""
    rng = random.Random(seed)
    claims = capabilities_of(backend)
    dims = [(K, V) for K, V in HEAD_DIMS if not claims.head_dims or {K, V} <= {*claims.head_dims}]
    K, V = rng.choice(dims)
    packed, N = rng.random() < 0.7, rng.randint(1, 6)
    lengths = tuple(rng.choice(LENGTHS) for _ in range(N)) if packed else None
    H = rng.randint(1, 2)
    case = PrefillCase(
        "random", B=1 if packed else N, T=rng.choice(LENGTHS[2:]), lengths=lengths, H=H,
        HV=H * rng.randint(1, 2), K=K, V=V,
        dtype=rng.choice([d for d in claims.dtypes if d != torch.float64]),
        pool=rng.choice([d for d in claims.prefill if d != torch.float64]),
        padding=rng.choice([0, 0, 8, 3]), null_index=rng.choice([-1, -1, 0]),
        own=rng.random() < 0.2, fresh=rng.random() < 0.5, fused=rng.random() < 0.5,
        checkpoints=rng.choice(["none", "pool", "buffer"]) if claims.checkpoints else "none",
        columns=rng.randint(0, 3), state_v_first=rng.random() < 0.5, out=rng.random() < 0.3,
        per_channel=claims.per_channel and rng.random() < 0.2,
        tail=rng.choice([0, 1, 64, 100]) if packed else 0,
    )  # fmt: skip
    return case, rng


def shuffled(inputs: dict[str, Any], rng: random.Random) -> None:
    """Offsets in any order, some of them none, and some tables in the other integer type."""
    offsets = inputs.get("checkpoint_offsets")
    if offsets is not None and offsets.dim() == 2:
        order = torch.tensor(rng.sample(range(offsets.shape[1]), offsets.shape[1]))
        inputs["checkpoint_offsets"] = offsets[:, order]
    if offsets is not None and len(offsets):
        inputs["checkpoint_offsets"][rng.randrange(len(offsets))] = 0
    for name in ("state_indices", "checkpoint_offsets", "checkpoint_indices", "cu_seqlens"):
        if inputs.get(name) is not None and rng.random() < 0.5:
            inputs[name] = inputs[name].to(rng.choice([torch.int32, torch.int64]))


@pytest.mark.parametrize("seed", range(24))
def test_random_prefills(backend: str, device: str, seed: int) -> None:
    if not capabilities_of(backend).prefill:
        pytest.skip("no prefill on a pool")
    case, rng = draw(seed, backend)
    inputs = make_prefill(case, "cpu", seed=seed, poison=rng.random() < 0.5)
    shuffled(inputs, rng)
    given = {n: x.to(device) if torch.is_tensor(x) else x for n, x in inputs.items()}
    given["state"] = copy_pool(inputs["state"], device)
    strided = ("q", "k", "v", "g", "beta", "A_log", "state_indices", "checkpoint_offsets")
    for name in (*strided, "checkpoint_indices", "cu_seqlens"):
        if given.get(name) is not None and rng.random() < 0.3:
            given[name] = beside_nan(given[name])
    if given.get("fresh") is not None and rng.random() < 0.5:
        given["fresh"] = torch.stack([~given["fresh"], given["fresh"]], 1)[:, 1]
    require(backend, given, prefill=True)
    assert_prefill_agrees(backend, case, given)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
def test_bad_offsets_are_skipped_on_a_gpu(backend: str, seed: int) -> None:
    """Offsets past the end or no multiple of 64, and lengths that leave the tokens, touch nothing
    else. There is no device assertion."""
    claims = capabilities_of(backend)
    if not (claims.prefill and claims.checkpoints):
        pytest.skip("no checkpoints")
    rng = random.Random(seed)
    case = PrefillCase(
        "bad", lengths=(130, 64, 5), HV=4, checkpoints="pool", columns=2, dtype=torch.bfloat16
    )
    inputs = make_prefill(case)
    good = inputs["checkpoint_offsets"].clone()
    bad = torch.tensor([[rng.choice([192, 65, -64, 10**6]) for _ in range(2)] for _ in range(3)])
    chosen = torch.rand(good.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    inputs["checkpoint_offsets"] = torch.where(chosen, 0, good)
    given = {n: x.cuda() if torch.is_tensor(x) else x for n, x in inputs.items()}
    given["state"] = copy_pool(inputs["state"], "cuda")
    require(backend, given, prefill=True)
    expected = given | {"state": copy_pool(inputs["state"], "cuda")}
    given["checkpoint_offsets"] = torch.where(chosen, bad.int(), good).cuda()

    o = gdn.gated_delta_net_prefill(**given, backend=backend)
    right = gdn.gated_delta_net_prefill(**expected, backend=backend)
    torch.cuda.synchronize()
    assert torch.equal(o, right)
    assert torch.equal(given["state"], expected["state"])


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [(0, 500, 3), (7, 2, 900), (-5, 40, 60), (0, 10**9, 10**9)])
def test_bad_lengths_stay_inside_the_tensors(backend: str, bounds: tuple[int, ...]) -> None:
    claims = capabilities_of(backend)
    if not claims.prefill or backend == "fla":
        pytest.skip("no prefill on a pool, or fla's own kernels")

    case = PrefillCase("lengths", lengths=(70, 30), HV=4, dtype=torch.bfloat16)
    inputs = make_prefill(case, "cuda")
    require(backend, inputs, prefill=True)
    inputs["cu_seqlens"] = torch.tensor(bounds, device="cuda")
    gdn.gated_delta_net_prefill(**inputs, backend=backend)
    torch.cuda.synchronize()
