"""What the benchmarks share: options, the rows that they select, and the columns of every row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter as clock
from typing import Any

import pytest
import torch
from ahead import compile_ahead, jobs
from report import columns
from report import rows as results
from suite import (
    DEVICE,
    DTYPE,
    HERE,
    ON_GPU,
    about,
    conversions,
    find_row,
    selected_backends,
    selected_decays,
    selected_gates,
    selected_norms,
    selected_passes,
    selected_shapes,
    selected_steps,
)

from gdn.compare import files, tables
from gdn.compare.comparison import plain_case, rates
from gdn.compare.environment import gpu_state
from gdn.compare.roofline import Work, ceilings
from gdn.compare.timing import Timing, rounds
from gdn.testing import Case

NOT_TIMED = pytest.StashKey[list[dict[str, Any]]]()
MEASURED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gdn", "comparative benchmarks of gdn")
    group.addoption(
        "--quick",
        action="store_true",
        help="few shapes: two minutes on an H100 with full kernel caches",
    )
    group.addoption("--full", action="store_true", help="every shape, length and kind of gate")
    group.addoption("--shapes", help="of prefill: grid, or such as 16/32:1x8192,2/8|4/16:1024+7168")
    group.addoption("--gates", help="of prefill, such as fast,model,mixed,none")
    group.addoption("--norms", help="the L2 norm in prefill: fused,no")
    group.addoption("--decays", help="per value head or channel: head,channel,bounded")
    group.addoption("--passes", help="of prefill: fwd,bwd,fwd+bwd")
    group.addoption("--heads", help="of decode, such as 2/8,16/32,16/64")
    group.addoption("--batches", help="of decode, such as 1,64,512")
    group.addoption("--ranks", help="also time context parallelism on so many GPUs: 1,2,4")
    group.addoption("--lengths", help="of context parallelism: 32768,131072,524288")
    group.addoption("--backends", help="such as triton,fla; all by default")
    group.addoption(
        "--same-bits", action="store_true", help="also time gdn.batch_invariant, and what it costs"
    )
    group.addoption("--layers", type=int, help="also time stacks of so many layers, such as 24")
    group.addoption(
        "--pools", action="store_true", help="also time prefill on pools, as servers call it"
    )
    group.addoption(
        "--seconds", type=float, default=1.0, help="GPU timing of a pass of all backends: 1.0"
    )
    group.addoption(
        "--ahead", action="store_true", help="first compile for all head counts, in parallel"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_TIMED], config.stash[MEASURED] = [], []
    # an interrupted row did not use its fixture; as an error that would lose the rows before it
    line = "default::pytest_benchmark.logger.PytestBenchmarkWarning"
    config.addinivalue_line("filterwarnings", line)
    target = config.getoption("benchmark_json", None)  # pytest-benchmark opens it after measuring,
    if isinstance(target, (str, os.PathLike)):  # or, before its version 5.3, at once
        try:
            files.require_writable("--benchmark-json", Path(target))
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Order the rows so that those that share a comparison follow each other."""
    config, names = metafunc.config, metafunc.fixturenames
    if "decay" in names and "backend" in names:
        metafunc.parametrize("decay", selected_decays(config))
    if "shape" in names:
        metafunc.parametrize("norm", selected_norms(config))
        metafunc.parametrize("gates", selected_gates(config))
        metafunc.parametrize("shape", selected_shapes(config))
        metafunc.parametrize("which", selected_passes(config))
    if "batch" in names:
        heads, batches = selected_steps(config)
        metafunc.parametrize("heads", heads)
        metafunc.parametrize("batch", batches)
    if "backend" in names:
        metafunc.parametrize("backend", selected_backends(config))


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.getoption("ahead") and not config.option.collectonly:
        conditions = selected_norms(config), selected_decays(config)
        shapes, passes = selected_shapes(config), selected_passes(config)
        found = jobs(selected_backends(config), shapes, passes, *conditions)
        print("", *compile_ahead(found), sep="\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings, such as those that peers give at import, do not fail a benchmark."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def record(benchmark: Any) -> Callable[..., None]:
    """Time `run` by the wall clock, with the device synchronised, and record the row. `gpu` is its
    GPU time and `least` its least work, where they are known."""

    def time(
        run: Callable[[], object],
        gpu: Timing | None = None,
        least: Work | None = None,
        budget: float = 0.5,
        **columns: object,
    ) -> None:
        def wait() -> None:
            run()
            if ON_GPU:
                torch.cuda.synchronize()

        wait()
        start = clock()
        wait()
        count = min(50, rounds(1e3 * (clock() - start), budget))
        benchmark.pedantic(wait, rounds=count)
        stats = benchmark.stats.stats
        wall = Timing(1e3 * stats.median, 5e2 * stats.iqr, count, "wall")
        timing = gpu or wall
        limits = ceilings(DEVICE, DTYPE)
        benchmark.extra_info |= columns | {
            "latency_ms": timing.ms,
            "spread_ms": timing.spread,
            "clock": timing.clock,
            "repeats": timing.repeats,
            **(rates(least, timing.ms, limits) if least else {}),
            "ceilings": limits._asdict(),
            "clocks": gpu_state(DEVICE, "clocks.sm", "clocks.mem", "temperature.gpu"),
            "environment": about(),
        }

    return time


@pytest.fixture
def record_pass(request: pytest.FixtureRequest, record: Any) -> Callable[..., None]:
    """Record one pass of one backend if it agrees with float64. Skip it with the backend's reasons
    if it cannot run, and fail without timing it if it disagrees."""

    def time(
        case: Case,
        backend: str,
        passes: tuple[str, ...],
        which: str,
        least: Work,
        decay: str,
        **columns: object,
    ) -> None:
        comparison, row = find_row(request.config, case, backend, passes)
        columns |= {"decay": decay} if decay != "head" else {}
        columns |= {"shape": case.name, "gates": case.gates, "pass": which, "backend": backend}
        not_timed = request.config.stash[NOT_TIMED]
        if which in row.refusals:
            why = "; ".join(row.refusals[which])
            not_timed.append(columns | {"refused": why})
            pytest.skip(why)
        if which in row.failures:
            not_timed.append(columns | {"failed": row.failures[which]})
            pytest.fail(f"not timed: {row.failures[which]}")
        seconds = request.config.getoption("seconds")
        if ON_GPU and which not in row.passes:
            comparison.time(which, ceilings(DEVICE, DTYPE), wall=False, seconds=seconds)
        found = row.passes.get(which)
        converting = conversions(comparison, backend, which)
        record(
            comparison.call(backend, which),
            found and found.gpu,
            least,
            seconds / 2,
            **columns,
            path=row.paths[which],
            case=plain_case(case),
            tokens=case.tokens * case.B,
            errors=row.errors,
            first_call_s=row.first_calls.get("fwd" if which == "fwd" else "fwd+bwd"),
            peak_mb=found and found.peak_bytes and found.peak_bytes / 1e6,
            conversions_ms=converting and converting.ms,
        )

    return time


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Keep only medians and spreads, and add the rows that were not timed, with the reasons."""
    output_json["benchmarks"] = [_shrink(row) for row in output_json["benchmarks"]]
    output_json["not_timed"] = config.stash[NOT_TIMED]


def _shrink(row: dict[str, Any]) -> dict[str, Any]:
    """A row of pytest-benchmark as this suite keeps it, with null for NaN."""
    stats = {name: row["stats"][name] for name in ("median", "iqr", "rounds")}
    extra = files.without_nan(row["extra_info"])
    return {"name": row["name"], "extra_info": extra, "stats": stats}


def _unfinished(config: pytest.Config) -> Path | None:
    """The file of the rows so far, beside that of --benchmark-json."""
    target: Any = config.getoption("benchmark_json", None)
    if target is None:
        return None
    path = target if isinstance(target, (str, os.PathLike)) else target.name  # or an open file
    return Path(path).with_suffix(".unfinished.json")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Write the rows so far, for a run that is killed."""
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    path, config = _unfinished(item.config), item.config
    if path and benchmark is not None and benchmark.stats:
        config.stash[MEASURED].append(_shrink(benchmark.stats.as_dict(False)))
        rows = {"benchmarks": config.stash[MEASURED], "not_timed": config.stash[NOT_TIMED]}
        path.with_suffix(".part").write_text(json.dumps(rows))
        path.with_suffix(".part").replace(path)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = _unfinished(session.config)
    if path and session.config.stash[MEASURED]:
        path.unlink()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print one Markdown table per kind of row."""
    session = getattr(config, "_benchmarksession", None)
    document = {"benchmarks": [row.as_dict() for row in session.benchmarks] if session else []}
    rows = results.rows_of(document)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        terminalreporter.write_sep("-", kind)
        table = columns.table([row for row in rows if row["kind"] == kind])
        terminalreporter.write_line(tables.markdown(*table))
