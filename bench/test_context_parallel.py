"""Context parallelism: one sequence whose tokens lie on 1, 2 and 4 GPUs of a host, beside fla's.
Run with --ranks. A row's efficiency is the time on one rank over ranks times the time on all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from context_ranks import Setting, measure
from suite import ON_GPU, about

from gdn.compare.roofline import PASSES

LENGTHS = (32768, 131072, 524288) if ON_GPU else (1024,)
HEADS = ("16/32", "16/64") if ON_GPU else ("1/1",)
GATES = ("fast", "none")


def settings_of(config: pytest.Config) -> list[Setting]:
    """Every setting that the options select, those of one rank first."""

    def chosen(option: str, default: tuple[Any, ...]) -> tuple[Any, ...]:
        given = config.getoption(option)
        return tuple(given.split(",")) if given else default

    ranks = sorted({1, *(int(n) for n in chosen("ranks", ()))}) if config.getoption("ranks") else []
    lengths = [int(n) for n in chosen("lengths", LENGTHS)]
    backends = chosen("backends", ("tilelang", "triton", "fla") if ON_GPU else ("torch",))
    passes = [p for p in PASSES if p in chosen("passes", ("fwd", "fwd+bwd"))]
    return [
        Setting(heads, T, gates, which, backend, count)
        for count in ranks
        for heads in chosen("heads", HEADS)
        for T in lengths
        for gates in chosen("gates", GATES)
        for which in passes
        for backend in backends
        if which != "bwd"
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = settings_of(metafunc.config)
    metafunc.parametrize("setting", found, ids=lambda s: "-".join(map(str, s)))


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    """The machine, asked before the ranks measure."""
    return about()


@pytest.fixture(scope="module")
def times(
    described: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A function that waits for what is found of a setting. One group of processes after another
    measures all settings of a number of ranks."""
    every, folder = settings_of(request.config), tmp_path_factory.mktemp("ranks")
    groups = itertools.groupby(every, lambda setting: setting.ranks)
    measured = itertools.chain.from_iterable(
        measure(list(group), ranks, Path(folder), 10 if ON_GPU else 3) for ranks, group in groups
    )
    found: dict[Setting, Any] = {}

    def wait_for(setting: Setting) -> Any:
        while setting not in found:
            found.update([next(measured)])
        return found[setting]

    return wait_for


def test_context_parallel(benchmark: Any, described: Any, times: Any, setting: Setting) -> None:
    alone, found = times(setting._replace(ranks=1)), times(setting)
    benchmark.pedantic(lambda: None)  # the ranks have measured it
    if isinstance(found, str):
        pytest.skip(found)
    eager, graph = found
    row = {
        "kind": "ranks", "shape": f"{setting.heads}:1x{setting.T}", "gates": setting.gates,
        "norm": "no", "pass": setting.which, "backend": setting.backend,
        "ranks": str(setting.ranks), "latency_ms": graph or eager, "eager_ms": eager,
        "clock": "graph" if graph else "events" if ON_GPU else "wall", "environment": described,
    }  # fmt: skip
    if not isinstance(alone, str) and bool(graph) == bool(alone[1]):
        row["efficiency"] = (alone[1] or alone[0]) / (setting.ranks * (graph or eager))
    benchmark.extra_info |= row
