"""What batch invariance costs: passes and decode steps in gdn.batch_invariant and outside of it,
interleaved, on every backend that claims it. Run with --same-bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from shapes import make_case, make_step_case
from suite import DEVICE, DTYPE, ON_GPU, find_row, selected_passes

import gdn
from gdn.compare.comparison import plain_case
from gdn.compare.decode import DECODE
from gdn.compare.roofline import Work, least_step_work, least_work
from gdn.compare.timing import Timing, gpu_times, wall_times
from gdn.registry import find_backend
from gdn.testing import Case


@pytest.fixture
def record_price(request: pytest.FixtureRequest, record: Any) -> Any:
    """Time one pass of one backend both ways, if it agrees with float64 in the mode too."""
    if not request.config.getoption("same_bits"):
        pytest.skip("run with --same-bits")

    def time(
        case: Case,
        backend: str,
        passes: tuple[str, ...],
        which: str,
        least: Work,
        **columns: object,
    ) -> None:
        claims = find_backend(backend).capabilities
        if not claims.batch_invariant:
            pytest.skip("does not claim batch invariance")
        comparison, found = find_row(request.config, case, backend, passes)
        row = replace(found, errors={}, failures=dict(found.failures), first_calls={})
        with gdn.batch_invariant():
            comparison.check(row)
            inside = comparison.call(backend, which) if row.fit(which) else None
        if which in row.refusals:
            pytest.skip("; ".join(row.refusals[which]))
        if inside is None:
            pytest.fail(f"not timed: {row.failures[which]}")

        def same() -> object:
            with gdn.batch_invariant():
                return inside()

        runs = {"any": comparison.call(backend, which), "same": same}
        seconds = request.config.getoption("seconds")
        graphs = dict.fromkeys(runs, claims.cuda_graph)
        times = gpu_times(runs, graphs, seconds) if ON_GPU else wall_times(runs, DEVICE, seconds)
        gpu: Timing | None = times["same"] if ON_GPU else None
        record(
            same, gpu, least, seconds / 2, **columns, kind="same bits", shape=case.name,
            gates=case.gates, backend=backend, case=plain_case(case), tokens=case.tokens * case.B,
            errors=row.errors, any_bits_ms=times["any"].ms, **{"pass": which},
        )  # fmt: skip

    return time


def test_prefill(
    request: pytest.FixtureRequest,
    record_price: Any,
    shape: str,
    gates: Any,
    norm: Any,
    which: str,
    backend: str,
) -> None:
    case, passes = make_case(shape, gates, DTYPE, norm), selected_passes(request.config)
    record_price(case, backend, passes, which, least_work(case, which), norm=norm)


def test_decode(record_price: Any, heads: str, batch: int, backend: str) -> None:
    case = make_step_case(heads, batch, DTYPE)
    record_price(case, backend, (DECODE,), DECODE, least_step_work(case), batch=batch)
