"""gdn's kernels behind SGLang's interface, against the definition. SGLang itself is not needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.integrations.sglang_kernels import GATED, RAW, Kernel
from gdn.testing import TOLERANCE
from gdn.testing.decode import run_step_definition
from gdn.testing.prefill import run_prefill_definition

H, HV, K, V, SLOTS = 2, 4, 16, 8, 7
SIZES = [H * K, H * K, HV * V]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def make_tokens(T: int) -> dict[str, Tensor]:
    """q, k, v [1, T, heads, size] as slices of one projection, and a, b [T, HV]."""
    q, k, v = draw(1, T, sum(SIZES)).split(SIZES, -1)
    tokens = {"q": q.unflatten(-1, (H, K)), "k": k.unflatten(-1, (H, K))}
    return tokens | {"v": v.unflatten(-1, (HV, V)), "a": draw(T, HV), "b": draw(T, HV) / 2}


GATE = {"A_log": draw(HV) / 2, "dt_bias": draw(HV + 1)[:HV]}


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("track", [False, True])
def test_extend(dtype: torch.dtype, track: bool) -> None:
    """Sequences go on from their slots; a tracked state is that after the chunks asked for."""
    pool, tokens = draw(SLOTS, HV, V, K).to(dtype), make_tokens(200)
    g, beta = -tokens.pop("a")[None].exp(), tokens.pop("b")[None].sigmoid()
    call = tokens | {"g": g, "beta": beta}
    places = {
        "state_indices": torch.tensor([4, -1, 2], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 130, 130, 195], dtype=torch.int32),
    }
    given: dict[str, Any] = {}
    if track:
        state = torch.full((3, HV, V, K), float("nan"))
        given = {"track_state": state, "track_chunk_idx": torch.tensor([2, -1, 1]).int()}
        places["checkpoint_offsets"] = torch.tensor([128, 0, 64])
        places["checkpoints"] = torch.zeros(3, HV, V, K, dtype=dtype)
    before = call | places | GATED | {"state": pool.clone()}
    expected, states, checkpoints = run_prefill_definition(before)
    output = torch.full((1, 200, HV, V), float("nan"))
    o, *rest = Kernel("torch").extend(
        **call, ssm_states=pool, cache_indices=places["state_indices"],
        query_start_loc=places["cu_seqlens"], output=output, layer_id=3, **given,
    )  # fmt: skip
    assert o is output
    assert rest == [None, None]
    agree(o[:, :195], expected[:, :195], dtype)
    assert o[:, 195:].isnan().all()  # padding of a captured graph
    agree(pool, states, dtype)
    if track:
        assert checkpoints is not None
        agree(state[[0, 2]], checkpoints[[0, 2]], dtype)


def test_extend_without_update_is_refused() -> None:
    tokens = make_tokens(3)
    a, b = tokens.pop("a")[None], tokens.pop("b")[None]
    pool, one = draw(SLOTS, HV, V, K), torch.ones(1, dtype=torch.int32)
    places = {"ssm_states": pool, "cache_indices": one, "query_start_loc": torch.tensor([0, 3])}
    with pytest.raises(NotImplementedError, match="inplace_update must be True, got False"):
        Kernel("torch").extend(**tokens, g=a, beta=b, inplace_update=False, **places)


@pytest.mark.parametrize("packed", [False, True])
def test_decode(packed: bool) -> None:
    pool, tokens = draw(SLOTS, HV, V, K), make_tokens(3)
    a, b = tokens.pop("a"), tokens.pop("b")
    slots = torch.tensor([3, -1, 5], dtype=torch.int32)
    steps = {name: x.transpose(0, 1) for name, x in tokens.items()}
    given = steps | {"g": a[:, None], "beta": b[:, None], "state": pool.clone(), **GATE, **RAW}
    expected, states = run_step_definition(given | {"state_indices": slots})
    places = {"ssm_states": pool, "cache_indices": slots}
    if packed:
        mixed = torch.cat([x[0].flatten(1) for x in tokens.values()], -1)
        sizes: Any = {"scale": K**-0.5, "num_v_heads": HV, "head_v_dim": V}
        o = Kernel("torch").packed_decode(mixed, a, b, **GATE, **places, **sizes)
    else:
        o = Kernel("torch").decode(
            **tokens, a=a, b=b, **GATE, **places, query_start_loc=torch.arange(4)
        )
    agree(o, expected.transpose(0, 1))
    agree(pool, states)
    assert not o[0, 1].any()


def test_verification_leaves_the_pool_alone() -> None:
    """A table of rows longer than the batch, as SGLang has it, and a padding row without tokens."""
    pool, tokens = draw(SLOTS, HV, V, K), make_tokens(6)
    a, b = tokens.pop("a"), tokens.pop("b")
    before, drafts = pool.clone(), torch.zeros(5, 4, HV, V, K)
    rows, slots = torch.arange(5, dtype=torch.int32), torch.tensor([3, 5, -1]).int()
    bounds = torch.tensor([0, 3, 6, 6], dtype=torch.int32)
    o = Kernel("torch").target_verify(
        **GATE, **tokens, a=a, b=b, ssm_states=pool, cache_indices=slots,
        query_start_loc=bounds, intermediate_states_buffer=drafts, intermediate_state_indices=rows,
        cache_steps=3, retrieve_parent_token=None,
    )  # fmt: skip
    expected, states = run_step_definition(
        tokens | {"g": a[None], "beta": b[None], "state": before, "state_indices": slots, **GATE}
        | {"output_states": torch.zeros(20, HV, V, K), "cu_seqlens": bounds, **RAW}
        | {"output_indices": 4 * rows[:3, None] + torch.arange(3)}
    )  # fmt: skip
    assert torch.equal(pool, before)
    agree(o, expected)
    agree(drafts, states.view_as(drafts))
    assert drafts[:2, :3].all()
    assert not drafts[2:].any()
