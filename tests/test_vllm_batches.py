"""Batches of vLLM by gdn, without vLLM: from metadata with the fields of vLLM's, on pools in byte
pages. tests/test_vllm_engine.py drives the engine itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_batches import Layer, Row, check, fill, make_request, together

import gdn
from gdn.integrations.vllm_batch import Rule, Tokens, run_batch, run_sample, samples
from gdn.testing import TOLERANCE

LAYERS = {
    "heads": Layer(),
    "negative": Layer(allow_neg_eigval=True),
    "channels": Layer(H=4, V=16, per_channel=True),
    "bound": Layer(H=4, V=16, per_channel=True, gate_lower_bound=-5.0),
}


class Identity:
    """In place of vLLM's convolution."""

    def speculative(self, x: Tensor) -> Tensor:
        return x

    others = speculative


def make_rule(layer: Layer, device: str = "cpu") -> Rule:
    options = {
        "A_log": layer.A_log.to(device), "dt_bias": layer.dt_bias.to(device),
        "backend": "torch" if device == "cpu" else "triton",
        "gate_lower_bound": layer.gate_lower_bound, "allow_neg_eigval": layer.allow_neg_eigval,
    }  # fmt: skip
    return Rule(layer.H, layer.HV, layer.K, layer.V, options)


def make_pool(
    layer: Layer, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Pages of bytes, 20 blocks, and the states in them, behind 96 bytes of something else."""
    size = layer.HV * layer.V * layer.K * dtype.itemsize
    pages = torch.zeros(20, 96 + size + 32, dtype=torch.int8, device=device)
    states = pages[:, 96 : 96 + size].view(dtype).view(20, layer.HV, layer.V, layer.K)
    return pages, states


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def integers(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_metadata(rows: list[Row], padding: int = 0, columns: int = 3) -> SimpleNamespace:
    """The fields of vLLM's metadata of a batch, with so many padding rows, without tokens, and
    tokens behind it."""
    speculative = [row for row in rows if row.accepted is not None]
    plain = [row for row in rows if row.accepted is None]
    decodes = [row for row in plain if row.length == 1 and row.start and not speculative]
    prefills = [row for row in plain if row not in decodes]
    slots = torch.zeros(len(plain) + padding, 2, dtype=torch.int32)  # [:, 0] is strided
    slots[: len(plain), 0] = integers([row.slots[0] for row in plain])
    marks = [row.checkpoint or (0, 0) for row in plain] + [(0, 0)] * padding
    table = [list(row.slots) + [0] * (columns - len(row.slots)) for row in speculative]
    kinds = torch.cat(
        [torch.zeros(0)] + [torch.full((row.length,), row.accepted is not None) for row in rows]
    ).bool()
    lengths = [row.length for row in prefills] + [0] * padding
    return SimpleNamespace(
        num_prefills=len(prefills),
        num_decodes=0 if not decodes else len(decodes) + (0 if prefills else padding),
        num_decode_tokens=len(decodes),
        num_spec_decodes=len(speculative) + (padding if not plain else 0),
        num_actual_tokens=sum(row.length for row in rows) + (0 if prefills else padding),
        spec_sequence_masks=torch.ones(1, dtype=torch.bool) if speculative else None,
        spec_token_indx=kinds.nonzero()[:, 0],
        non_spec_token_indx=(~kinds).nonzero()[:, 0],
        spec_query_start_loc=bounds([row.length for row in speculative] + [0] * padding),
        spec_state_indices_tensor=integers(table + [[0] * columns] * padding),
        num_accepted_tokens=integers([row.accepted for row in speculative] + [1] * padding),
        non_spec_state_indices_tensor=slots[:, 0],
        prefill_query_start_loc=bounds(lengths),
        prefill_state_indices=slots[len(decodes) :, 0],
        prefill_has_initial_state=torch.tensor(
            [row.start > 0 for row in prefills] + [False] * padding
        ),
        checkpoint=SimpleNamespace(
            checkpoint_offsets=integers([offset for offset, _ in marks]),
            state_indices=integers([slot for _, slot in marks]),
        ) if any(offset for offset, _ in marks) else None,
    )  # fmt: skip


def make_rows(kind: str, layer: Layer) -> list[Row]:
    a, b, c, d = (make_request(layer, seed, 160) for seed in (11, 12, 13, 14))
    return {
        "mixed": [
            Row(a, 30, 1, (5,)), Row(b, 7, 1, (3,)), Row(c, 20, 140, (9,), checkpoint=(64, 11)),
            Row(d, 0, 70, (2,)),
        ],
        "decodes": [Row(a, 30, 1, (5,)), Row(b, 7, 1, (3,)), Row(c, 20, 1, (9,))],
        "speculative": [Row(a, 30, 3, (5, 6, 7), 2), Row(b, 9, 3, (1, 8, 2), 1)],
        "speculative-mixed": [
            Row(a, 30, 3, (5, 6, 7), 3), Row(c, 20, 1, (9,)), Row(b, 9, 2, (1, 8), 1),
            Row(d, 0, 70, (3,)),
        ],
    }[kind]  # fmt: skip


def move(metadata: SimpleNamespace, device: str) -> SimpleNamespace:
    """The metadata with its tensors on a device."""
    moved = {}
    for name, x in vars(metadata).items():
        moved[name] = move(x, device) if isinstance(x, SimpleNamespace) else x
        if isinstance(x, Tensor):
            moved[name] = x.to(device)
    return SimpleNamespace(**moved)


def run(
    rows: list[Row], layer: Layer, padding: int, dtype: torch.dtype, tolerance: float,
    device: str = "cpu",
) -> None:  # fmt: skip
    metadata = move(make_metadata(rows, padding), device)
    pages, pool = make_pool(layer, dtype, device)
    fill(pool, rows)
    before, pages_before = pool.clone(), pages.clone()
    behind = 4  # tokens of a captured graph
    tokens = (
        torch.cat([x, torch.full_like(x[:1], torch.nan).expand(behind, *x.shape[1:])]).to(device)
        for x in (together(rows, name) for name in ("qkv", "gate", "beta"))
    )
    live = len(together(rows, "o"))
    out = torch.zeros(live + behind, layer.HV, layer.V, device=device)
    with torch.inference_mode():
        run_batch(metadata, Tokens(*tokens), make_rule(layer, device), Identity(), pool, out)
    check(rows, out.cpu(), before.cpu(), pool.cpu(), tolerance)
    assert not out[live:].any(), "padding must stay zero"
    gaps = torch.ones_like(pages, dtype=torch.bool)
    gaps[:, 96:-32] = False
    assert torch.equal(pages[gaps], pages_before[gaps])


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("kind", ["mixed", "decodes", "speculative", "speculative-mixed"])
@pytest.mark.parametrize("layer", LAYERS)
def test_batches(layer: str, kind: str, padding: int) -> None:
    if kind == "speculative-mixed" and padding:
        pytest.skip("vLLM captures graphs of one kind of steps")
    rows = make_rows(kind, LAYERS[layer])
    run(rows, LAYERS[layer], padding, torch.float32, TOLERANCE[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mixed", "decodes", "speculative", "speculative-mixed"])
@pytest.mark.parametrize("layer", LAYERS)
def test_batches_on_a_gpu(layer: str, kind: str) -> None:
    rows = make_rows(kind, LAYERS[layer])
    padding = 0 if kind == "speculative-mixed" else 2
    tolerance = TOLERANCE[torch.float32]
    run(rows, LAYERS[layer], padding, torch.float32, tolerance, device="cuda")


def test_pool_in_bfloat16() -> None:
    layer = LAYERS["heads"]
    run(make_rows("mixed", layer), layer, 1, torch.bfloat16, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("per_channel", [False, True])
def test_samples_touch_no_state(per_channel: bool) -> None:
    layer = LAYERS["channels" if per_channel else "heads"]
    _, pool = make_pool(layer)
    pool.normal_()
    before = pool.clone()
    calls = list(samples(make_rule(layer), pool, torch.bfloat16, per_channel, 3, True))
    assert [call.prefill for call in calls] == [False, False, True, True]
    with torch.inference_mode():
        for call in calls:
            name = gdn.warmup(**call.tokens, **call.keywords, prefill=call.prefill)
            assert name == "torch"
            run_sample(call)
    assert torch.equal(pool, before)
