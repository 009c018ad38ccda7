"""gdn in the real SGLang, on a CPU (`tox -e sglang`): what its scheduler asks of a Gated DeltaNet
layer, through its registries, metadata and hooks, against the definition."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.testing import TOLERANCE

pytest.importorskip("sglang", reason="sglang is not installed; tox -e sglang")
engines = importlib.import_module("sglang_engine")
integration = importlib.import_module("gdn.integrations.sglang")
BOTH = {"linear_attn_decode_backend": "gdn", "linear_attn_prefill_backend": "gdn"}
FREE = 9
"""A slot that no request has."""
pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # SGLang's own


@pytest.fixture(scope="module", autouse=True)
def plugins() -> Any:
    return engines.load()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    torch.manual_seed(0)
    with engines.Engine(engines.Shape(pool=request.param), **BOTH) as engine:
        engine.pools.mamba_pool.mamba_cache.temporal.fill_(7)  # nobody's
        yield engine


class Request:
    """A request of an engine: its row and slot, and the tokens that it has had."""

    def __init__(self, engine: Any, row: int, copy_of: int | None = None) -> None:
        self.engine, self.row, self.tokens = engine, row, engine.draw(0)
        engine.assign(row, row)
        pool, slot = engine.pools.mamba_pool, torch.tensor([row])
        if copy_of is None:
            pool.clear_slots(slot)
        else:
            pool.copy_from(torch.tensor([copy_of]), slot)

    def take(self, tokens: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens, tokens])
        return tokens

    def check(self, o: Tensor) -> None:
        """o is that of the last tokens, and the slot holds the state after them."""
        expected, states = self.engine.truth(self.tokens)
        agree(o, expected[-len(o) :], self.engine)
        agree(self.engine.states[self.row], states[-1], self.engine)


def agree(found: Tensor, expected: Tensor, engine: Any) -> None:
    tolerance = TOLERANCE[engine.shape.pool]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def prefill(
    requests: list[Request], lengths: list[int], track: dict[int, int] | None = None
) -> None:
    engine, before = requests[0].engine, [len(r.tokens) for r in requests]
    parts = [r.take(engine.draw(n)) for r, n in zip(requests, lengths, strict=True)]
    outputs = engine.extend([r.row for r in requests], parts, before, track)
    for request, o in zip(requests, outputs, strict=True):
        request.check(o)


def decode(requests: list[Request], padding: int | None = None) -> None:
    engine = requests[0].engine
    new = torch.cat([r.take(engine.draw(1)) for r in requests])
    lengths, rows = [len(r.tokens) for r in requests], [r.row for r in requests]
    for _ in range(padding or 0):
        new, lengths, rows = torch.cat([new, engine.draw(1)]), [*lengths, 1], [*rows, 1]
    found = engine.decode(rows, new, lengths, padding)
    for request, o in zip(requests, found, strict=False):
        request.check(o[None])
    assert not found[len(requests) :].any()


def test_requests_agree_with_the_definition(engine: Any) -> None:
    """Fresh and resumed prefills, checkpoints and a prefix that starts from one, decode steps, a
    speculative step, and a padded batch of a captured graph. Other slots keep their bits."""
    one, two, three = (Request(engine, row) for row in (1, 2, 3))
    prefill([one, two], [70, 130], track={1: 5, 2: 6})
    decode([one, two])
    for slot, request, tokens in ((5, one, 64), (6, two, 128)):
        agree(engine.states[slot], engine.truth(request.tokens[:tokens])[1][-1], engine)
    prefill([one, three], [5, 64], track={3: 7})  # resumed; and fresh, whose end is tracked
    agree(engine.states[7], engine.truth(three.tokens)[1][-1], engine)
    decode([three, one, two])

    four = Request(engine, 4, copy_of=6)  # SGLang's copy on write of a cached prefix
    four.tokens = two.tokens[:128]
    prefill([four], [3])

    speculate([four, one], accepted=[2, 0])
    decode([one, four])

    engine.backend.init_cuda_graph_state(4, 4)
    decode([two, three], padding=2)
    decode([one], padding=0)
    assert bool((engine.states[FREE:] == 7).all())


def speculate(requests: list[Request], accepted: list[int]) -> None:
    """Verify three draft tokens each; the pool changes only when they are accepted."""
    engine = requests[0].engine
    drafts = torch.stack([engine.draw(3) for _ in requests])
    lengths, before = [len(r.tokens) + 3 for r in requests], engine.states.clone()
    found = engine.verify([r.row for r in requests], drafts, lengths)
    assert torch.equal(engine.states, before)
    for n, request in enumerate(requests):
        expected, _ = engine.truth(torch.cat([request.tokens, drafts[n]]))
        agree(found[n], expected[-3:], engine)
    engine.commit(accepted)
    for n, request in enumerate(requests):
        request.take(drafts[n, : accepted[n] + 1])
        request.check(found[n, : accepted[n] + 1])
