"""gdn's kernels behind SGLang's interface, against the definition. SGLang itself is not needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn
from gdn.integrations.sglang_kernels import GATED, RAW, Kernel, count
from gdn.testing import TOLERANCE
from gdn.testing.decode import run_step_definition
from gdn.testing.prefill import run_prefill_definition

H, HV, SLOTS = 2, 4, 7
POOLS = pytest.mark.parametrize(
    "pool", [torch.float32, torch.bfloat16], ids=["float32-pool", "bfloat16-pool"]
)


@dataclass
class Layer:
    """A backend's kernel, and tensors for it."""

    kernel: Kernel
    device: str
    dtype: torch.dtype
    K: int
    V: int

    def draw(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
        return drawn.to(self.device)

    def index(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def make_pool(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.draw(SLOTS, HV, self.V, self.K).to(dtype)

    @property
    def gate(self) -> dict[str, Tensor]:
        return {"A_log": self.draw(HV) / 2, "dt_bias": self.draw(HV + 1)[:HV]}

    def make_tokens(self, T: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """q, k, v [1, T, heads, size] as slices of one projection; a and b [T, HV]."""
        sizes = [H * self.K, H * self.K, HV * self.V]
        parts = self.draw(1, T, sum(sizes)).to(self.dtype).split(sizes, -1)
        heads = zip("qkv", parts, (self.K, self.K, self.V), strict=True)
        tokens = {name: x.unflatten(-1, (-1, size)) for name, x, size in heads}
        return tokens, self.draw(T, HV), self.draw(T, HV) / 2

    def agree(self, found: Tensor, expected: Tensor, pool: torch.dtype = torch.float32) -> None:
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE[pool])
        expected = expected.to(found.device)
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def layer(backend: str, device: str, dtype: torch.dtype) -> Layer:
    return Layer(Kernel(backend), device, dtype, *((16, 8) if device == "cpu" else (64, 128)))


def claimed(test: Callable[..., None]) -> Callable[..., None]:
    """The test, skipped where the backend does not claim its calls."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        try:
            test(**fixtures)
        except gdn.BackendUnsupportedError as error:
            pytest.skip(str(error))

    return run


@POOLS
@pytest.mark.parametrize("track", [False, True], ids=["", "track"])
@claimed
def test_extend(layer: Layer, pool: torch.dtype, track: bool) -> None:
    """Sequences go on from their slots; a tracked state is that after the chunks asked for."""
    states, (tokens, a, b) = layer.make_pool(pool), layer.make_tokens(200)
    call = tokens | {"g": -a[None].exp(), "beta": b[None].sigmoid()}
    slots, bounds = layer.index(4, -1, 2), layer.index(0, 130, 130, 195)
    places = {"state_indices": slots, "cu_seqlens": bounds}
    given: dict[str, Any] = {}
    shape = (3, HV, layer.V, layer.K)
    if track:
        state = torch.full(shape, float("nan"), device=layer.device)
        given = {"track_state": state, "track_chunk_idx": layer.index(2, -1, 1)}
        places["checkpoint_offsets"] = layer.index(128, 0, 64)
        places["checkpoints"] = torch.zeros_like(state, dtype=pool)
    expected, after, checkpoints = run_prefill_definition(
        call | places | GATED | {"state": states.clone()}
    )
    output = torch.full_like(tokens["v"].contiguous(), float("nan"))
    o, *rest = layer.kernel.extend(
        **call, ssm_states=states, cache_indices=slots, query_start_loc=bounds, output=output,
        layer_id=3, **given,
    )  # fmt: skip
    assert o is output
    assert rest == [None, None]
    layer.agree(o[:, :195], expected[:, :195], pool)
    assert o[:, 195:].isnan().all()  # padding of a captured graph
    layer.agree(states, after, pool)
    if track:
        assert checkpoints is not None
        layer.agree(state[[0, 2]], checkpoints[[0, 2]], pool)


def test_extend_without_update_is_refused(layer: Layer) -> None:
    tokens, a, b = layer.make_tokens(3)
    places = {"ssm_states": layer.make_pool(), "cache_indices": layer.index(1)}
    places["query_start_loc"] = layer.index(0, 3)
    with pytest.raises(NotImplementedError, match="inplace_update must be True, got False"):
        layer.kernel.extend(**tokens, g=a[None], beta=b[None], inplace_update=False, **places)


@POOLS
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@claimed
def test_decode(layer: Layer, pool: torch.dtype, packed: bool) -> None:
    states, (tokens, a, b) = layer.make_pool(pool), layer.make_tokens(3)
    slots, gate = layer.index(3, -1, 5), layer.gate
    steps = {name: x.transpose(0, 1) for name, x in tokens.items()}
    given = steps | {"g": a[:, None], "beta": b[:, None], "state": states.clone(), **gate, **RAW}
    expected, after = run_step_definition(given | {"state_indices": slots})
    places = {"ssm_states": states, "cache_indices": slots}
    if packed:
        mixed = torch.cat([x[0].flatten(1) for x in tokens.values()], -1)
        sizes: Any = {"scale": layer.K**-0.5, "num_v_heads": HV, "head_v_dim": layer.V}
        o = layer.kernel.packed_decode(mixed, a, b, **gate, **places, **sizes)
    else:
        bounds = layer.index(0, 1, 2, 3)
        o = layer.kernel.decode(**tokens, a=a, b=b, **gate, **places, query_start_loc=bounds)
    layer.agree(o, expected.transpose(0, 1), pool)
    layer.agree(states, after, pool)
    assert not o[0, 1].any()


@POOLS
@claimed
def test_verification_leaves_the_pool_alone(layer: Layer, pool: torch.dtype) -> None:
    """A table of rows longer than the batch, as SGLang has it, and a padding row without tokens."""
    states, (tokens, a, b) = layer.make_pool(pool), layer.make_tokens(6)
    before, gate = states.clone(), layer.gate
    drafts = torch.zeros(5, 4, *states.shape[1:], dtype=pool, device=layer.device)
    rows, slots, bounds = layer.index(*range(5)), layer.index(3, 5, -1), layer.index(0, 3, 6, 6)
    table = 4 * rows[:3, None] + torch.arange(3, device=layer.device)
    expected, after = run_step_definition(
        tokens | {"g": a[None], "beta": b[None], "state": before, "state_indices": slots, **gate}
        | {"output_states": drafts.flatten(0, 1).clone(), "output_indices": table, **RAW}
        | {"cu_seqlens": bounds}
    )  # fmt: skip
    o = layer.kernel.target_verify(
        **gate, **tokens, a=a, b=b, ssm_states=states, cache_indices=slots,
        query_start_loc=bounds, intermediate_states_buffer=drafts, intermediate_state_indices=rows,
        cache_steps=3, retrieve_parent_token=None,
    )  # fmt: skip
    assert torch.equal(states, before)
    layer.agree(o, expected, pool)
    layer.agree(drafts, after.view_as(drafts), pool)
    assert drafts[:2, :3].all()
    assert not drafts[2:].any()


def test_numbers_are_made_once() -> None:
    found = count(4, torch.int32, torch.device("cpu"))
    assert found.tolist() == [0, 1, 2, 3]
    assert count(4, torch.int32, torch.device("cpu")) is found


@pytest.mark.gpu
def test_numbers_of_a_graph_stay_in_it() -> None:
    """What a graph makes is there once it runs."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        made = count(5, torch.int64, torch.device("cuda"))
    found = count(5, torch.int64, torch.device("cuda"))
    assert found is not made
    assert found.tolist() == [0, 1, 2, 3, 4]
