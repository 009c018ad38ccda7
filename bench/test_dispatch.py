"""Host time of choosing a backend, at most 5 microseconds for a repeated call; and of issuing a
whole call without waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
from shapes import make_case
from suite import DEVICE, DTYPE

import gdn
from gdn import dispatch
from gdn.problem import Call
from gdn.testing import Case, make_inputs

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


def test_issuing(benchmark: Any, backend: str) -> None:
    """Forward on one chunk, where the host takes longer than the GPU."""
    inputs = make_inputs(make_case("1/1:1x64", "model", DTYPE), DEVICE)
    (verdict,) = (v for v in gdn.explain(**inputs).verdicts if v.name == backend)
    if verdict.reasons:
        pytest.skip("; ".join(verdict.reasons))

    def call() -> object:
        return gdn.gated_delta_net(**inputs, backend=backend)

    benchmark.pedantic(call, rounds=30, iterations=10, warmup_rounds=2)
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {"kind": "issuing", "backend": backend, "latency_ms": 1e3 * median}
