"""Host time of choosing a backend, at most 5 microseconds for a repeated call; and of issuing a
whole call, of whole sequences, on a pool or of one token, without waiting for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from shapes import make_case, make_pool_case, make_step_case
from suite import DEVICE, DTYPE
from test_pool import PoolCall

import gdn
from gdn import dispatch
from gdn.problem import Call
from gdn.testing import Case, make_inputs
from gdn.testing.decode import make_step

LIMIT = 5e-6
CASE = Case("choice", T=128, H=16, HV=32, K=128, V=128, fused=True)


@pytest.mark.parametrize("source", ["auto", "argument", "context", "environment"])
def test_choosing(benchmark: Any, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    call = Call(**{"scale": CASE.K**-0.5} | make_inputs(CASE, DEVICE))
    argument = "torch" if source == "argument" else None
    if source == "environment":
        monkeypatch.setenv("GDN_BACKEND", "torch")

    def choose() -> object:
        return dispatch.choose(dispatch.request_in_force(argument)[0], call, True)

    choose()
    if source == "context":
        with dispatch.use_backend("torch"):
            benchmark(choose)
    else:
        benchmark(choose)
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {"kind": "choosing", "source": source, "latency_ms": 1e3 * median}
    assert median <= LIMIT


def make_run(work: str, backend: str) -> Callable[[], object]:
    """A call on one chunk, or one token, where the host takes longer than the GPU."""
    if work == "prefill":
        return PoolCall(make_pool_case("1/1:1x64", DTYPE)).prefill(backend)
    if work == "decode":
        step = make_step(make_step_case("1/1", 1, DTYPE), DEVICE)
        return functools.partial(gdn.gated_delta_net_decode, **step, backend=backend)
    inputs = make_inputs(make_case("1/1:1x64", "model", DTYPE), DEVICE)
    return functools.partial(gdn.gated_delta_net, **inputs, backend=backend)


@pytest.mark.parametrize("work", ["forward", "prefill", "decode"])
def test_issuing(benchmark: Any, work: str, backend: str) -> None:
    run = make_run(work, backend)
    try:
        run()
    except (gdn.BackendUnsupportedError, ModuleNotFoundError) as error:
        pytest.skip(str(error))
    benchmark.pedantic(run, rounds=30, iterations=10, warmup_rounds=2)
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {"kind": "issuing", "pass": work, "backend": backend}
    benchmark.extra_info |= {"latency_ms": 1e3 * median}
