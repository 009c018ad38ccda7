"""gdn in the real SGLang, on a CPU (`tox -e sglang`): what its scheduler asks of a Gated DeltaNet
layer, through its registries, metadata and hooks, against the definition."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import logging
import types
from collections.abc import Iterator
from typing import Any

import pytest
import sglang_fake as fake
import torch
from torch import Tensor

import gdn
from gdn.testing import TOLERANCE

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; tox -e sglang", allow_module_level=True)
engines = importlib.import_module("sglang_engine")
engines.load()
sglang = importlib.import_module("sglang")
integration = importlib.import_module("gdn.integrations.sglang")
BOTH = {"linear_attn_decode_backend": "gdn", "linear_attn_prefill_backend": "gdn"}
FREE = 9
"""A slot that no request has."""
pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # SGLang's own


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


def test_an_unpacked_decode_step_agrees(engine: Any) -> None:
    """What SGLang calls for kernels without a packed one."""
    request = Request(engine, 2)
    engine.kernels.supports_packed_decode = False
    prefill([request], [3])
    decode([request])


def test_the_names_and_signatures_are_those_of_the_fake() -> None:
    """The tests without SGLang stand on them."""
    linear = engines.find("layers.attention.linear.gdn_backend")
    kernel = engines.find("layers.attention.linear.kernels.gdn_triton").TritonGDNKernel
    pairs = [
        (linear.GDNAttnBackend.__init__, fake.GDNAttnBackend.__init__),
        (linear.GDNKernelDispatcher.__init__, fake.GDNKernelDispatcher.__init__),
        (
            engines.find("layers.attention.linear.kda_backend").KDAAttnBackend.__init__,
            fake.KDAAttnBackend.__init__,
        ),
        (
            inspect.unwrap(
                engines.find("layers.attention.linear.utils").resolve_linear_attn_backends
            ),
            fake.Fake.resolve,
        ),
        *(
            (getattr(kernel, name), getattr(fake.TritonGDNKernel, name))
            for name in ("packed_decode", "decode", "extend", "target_verify")
        ),
    ]
    for real, faked in pairs:
        expected, found = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (real, faked)
        )
        assert [x for x in found if x[0] != "self"] == [x for x in expected if x[0] != "self"]
    assert integration.signature_faults(kernel) == []
    phases = linear.LinearAttnBackends.__struct_fields__
    assert phases == tuple(fake.LinearAttnBackends.__dataclass_fields__)
    assert sglang.__version__ == integration.VERSION, "read the new one, and say so in the docs"


def test_the_command_line_takes_the_choice() -> None:
    parser = argparse.ArgumentParser()
    engines.find("server_args").ServerArgs.add_cli_args(parser)
    flags = ["--linear-attn-decode-backend", "gdn", "--linear-attn-prefill-backend", "gdn"]
    found = parser.parse_args(["--model-path", "dummy", *flags])
    assert found.linear_attn_decode_backend == found.linear_attn_prefill_backend == "gdn"


def test_the_flag_for_all_phases_is_refused() -> None:
    step = engines.find("arg_groups.attention_hook").handle_linear_attn_backend
    args = types.SimpleNamespace(linear_attn_backend="gdn")
    with pytest.raises(ValueError, match="--linear-attn-backend must not be gdn"):
        engines.find("arg_groups.resolution_hooks").run_hook(step, args)


@pytest.mark.parametrize(
    ("flags", "left", "reason"),
    [
        ({"enable_mis": True}, ["extend"], "prefill left to SGLang: gdn does not score several"),
        ({"enable_deterministic_inference": True}, [], "0.5.23, batch-invariant: decode by to"),
        ({"linear_attn_prefill_backend": None}, ["extend"], ": decode by torch, verify by torch"),
    ],
)
def test_kernels_follow_the_flags(
    caplog: pytest.LogCaptureFixture, flags: dict[str, Any], left: list[str], reason: str
) -> None:
    with (
        caplog.at_level(logging.INFO, "sglang"),
        engines.Engine(engines.Shape(), **BOTH | flags) as engine,
    ):
        for place in ("decode", "extend", "verify"):
            kernel = type(getattr(engine.kernels, f"{place}_kernel")).__name__
            assert kernel == ("TritonGDNKernel" if place in left else "GdnKernel")
        tree = engine.kernels._get_target_verify_kernel(torch.zeros(1))  # of drafts
        assert type(tree).__name__ == "TritonGDNKernel"
    gdn.set_batch_invariant(None)
    (line,) = [x.getMessage() for x in caplog.records if x.getMessage().startswith("gdn in")]
    assert reason in line


def test_kimi_delta_attention_stays_with_sglang(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kda = engines.find("layers.attention.linear.kda_backend")
    with (
        caplog.at_level(logging.INFO, "sglang"),
        engines.Engine(engines.Shape(), **BOTH) as engine,
    ):
        kernels = kda.KDAAttnBackend(engine.runner).kernel_dispatcher
    assert type(kernels.decode_kernel).__name__ == "TritonKDAKernel"
    said = "decode and prefill and verify left to SGLang: gdn serves no Kimi Delta Attention there"
    assert caplog.records[-1].getMessage().endswith(said)


def test_the_benchmark_times_what_agrees() -> None:
    """On a CPU that is gdn, and of SGLang's kernels the one that Triton's interpreter runs."""
    bench = importlib.import_module("sglang_kernels")
    sizes = ["--heads", "1/2", "--size", "16", "--prefill", "1x70,5+64", "--batches", "1"]
    found = bench.main([*sizes, "--backends", "torch"]).times
    assert list(found) == ["prefill 1x70", "prefill 5+64", "decode 1", "verify 1"]
    assert all("gdn torch" in times for times in found.values())
    assert "triton" in found["verify 1"]
