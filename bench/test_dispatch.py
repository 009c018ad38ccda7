"""What choosing a backend costs a call once it is warm: at most 5 microseconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gdn import dispatch
from gdn.problem import Call
from gdn.testing import Case, make_inputs

LIMIT = 5e-6
CASE = Case("choice", T=128, H=16, HV=32, K=128, V=128, fused=True)


@pytest.mark.parametrize("source", ["auto", "argument", "context", "environment"])
def test_choosing(benchmark: Any, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = Call(**{"scale": CASE.K**-0.5} | make_inputs(CASE, device))
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
    benchmark.extra_info["request from"] = source
    assert benchmark.stats.stats.median <= LIMIT
