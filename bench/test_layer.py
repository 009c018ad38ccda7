"""A user's layers end to end: prefill, a training step and decode of a stack of linear attention
layers, alone and with an MLP after each. Rows of kind "layer": transformers' layers as they are
(with fla, and a kernel for the convolution), patched, and gdn.nn's. Run with --layers N (24 for
Qwen3.5-4B's)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

import layers
import pytest
import torch
from suite import DEVICE, DTYPE, ON_GPU

from gdn.compare.timing import peak_memory
from gdn.testing import TOLERANCE, relative_error

PASSES = (
    "prefill 1x8192", "prefill 1x32768", "train 1x8192", "decode 1x1", "decode 64x1",
    "prefill 1x8192 with MLPs", "train 1x8192 with MLPs", "decode 1x1 with MLPs",
)  # fmt: skip
ON_CPU = ("prefill 1x128", "train 1x128", "decode 2x1", "train 1x128 with MLPs")
STEPS = 16
"""Decode steps that make a sample."""


@pytest.fixture
def depth(request: pytest.FixtureRequest) -> int:
    if not request.config.getoption("layers"):
        pytest.skip("run with --layers N")
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    return int(request.config.getoption("layers"))


@functools.lru_cache(maxsize=1)
def engines(depth: int, mlps: bool) -> dict[str, layers.Engine]:
    if ON_GPU:
        layers.install_convolution()
    else:
        layers.use_plain_transformers()
    return layers.make_engines(depth, DEVICE, DTYPE, small=not ON_GPU, with_mlps=mlps)


def make_input(shape: str) -> torch.Tensor:
    B, T = (int(n) for n in shape.split("x"))
    torch.manual_seed(1)
    return torch.randn(B, T, layers.WIDTH if ON_GPU else 64, device=DEVICE, dtype=DTYPE)


class Measured(NamedTuple):
    """A pass of one engine: how to run it, in which context, and what was found out."""

    run: Callable[[], torch.Tensor]
    context: Callable[[], AbstractContextManager[Any]]
    columns: dict[str, Any]


@functools.lru_cache(maxsize=1)  # one pass's tensors at a time, two where one follows another
def measure(depth: int, which: str) -> dict[str, Measured]:
    """Every engine in a pass: times, launches and peak memory, and how far its result is from that
    of unpatched transformers."""
    name, shape, *mlps = which.split()
    made, x = engines(depth, bool(mlps)), make_input(shape)
    runs = {engine: layers.make_run(made[engine], name, x) for engine in layers.ENGINES}
    found = {engine: Measured(run, made[engine].context, {}) for engine, run in runs.items()}
    first = runs["transformers"]()
    for run, context, columns in found.values():
        with context():
            columns["error"] = relative_error(run(), first)
            columns["launches"] = layers.count_launches(run) if ON_GPU else None
            peak = peak_memory(run, DEVICE)
            columns["peak_mb"] = peak and peak / 1e6
    each = STEPS if name == "decode" else 1
    for engine, timing in layers.interleave(made, runs, 4.0 if ON_GPU else 0.5, each).items():
        found[engine].columns["timing"] = timing
    if name == "decode":
        for engine in layers.ENGINES:
            with suppress(torch._dynamo.exc.Unsupported):
                found[f"{engine}, compiled"] = measure_compiled(made[engine], x)
    base = found["transformers"].columns["timing"].ms
    for one in found.values():
        one.columns["speed_up"] = base / one.columns["timing"].ms
    return found


def measure_compiled(engine: layers.Engine, x: torch.Tensor) -> Measured:
    """A decode step as one graph. It is timed alone, since a patch that ends and begins again would
    have it compiled again."""
    context = engine.context()
    with context:
        run = layers.compile_step(engine, x, "inductor" if ON_GPU else "aot_eager")
        for _ in range(3):
            run()
        still = {"": layers.Engine(engine.stack, nullcontext)}
        (timing,) = layers.interleave(still, {"": run}, 1.0, STEPS).values()
    return Measured(run, engine.context, {"timing": timing})


COMPILED = tuple(f"{engine}, compiled" for engine in layers.ENGINES)


@pytest.mark.parametrize("engine", [*layers.ENGINES, *COMPILED])
@pytest.mark.parametrize("which", PASSES if ON_GPU else ON_CPU)
def test_layers(record: Any, depth: int, which: str, engine: str) -> None:
    if "compiled" in engine and not which.startswith("decode"):
        pytest.skip("compiled is for decode")
    found = measure(depth, which)
    if engine not in found:
        pytest.skip("it breaks the graph")
    run, context, columns = found[engine]
    row = dict(columns)
    assert row.get("error", 0.0) <= TOLERANCE[DTYPE] * depth**0.5
    with context():
        record(
            run, row.pop("timing"), None, 0.2, kind="layer", shape=which, backend=engine,
            layers=depth, **row,
        )  # fmt: skip
