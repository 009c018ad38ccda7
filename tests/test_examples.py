"""The examples run, and show what they say they show."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gdn

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    """An example as a module; examples are not installed."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_serving_together_writes_what_serving_alone_does(backend: str, device: str) -> None:
    """Continuous batching, three slots for seven requests, against one request at a time."""
    generate = load("generate")
    torch.manual_seed(0)
    model = generate.Model(2, 32, 1, 2, 16, 16).to(device)
    if {v.name: v for v in generate.explain(model).verdicts}[backend].reasons:
        pytest.skip(f"{backend} does not take these steps")
    written = []
    for slots in (3, 1):
        requests = generate.make_requests(7, 70, 6)
        with gdn.use_backend(backend):
            prefill, decode = generate.serve(model, requests, slots)
        assert prefill.tokens == sum(len(request.prompt) for request in requests)
        assert decode.tokens == sum(request.length - 1 for request in requests)
        written.append([request.written for request in requests])
        assert all(len(r.written) == r.length for r in requests)
    assert written[0] == written[1]


def test_generate_prints_a_line_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    generate = load("generate")
    options = ["--requests", "2", "--slots", "2", "--prompt", "9", "--length", "3"]
    generate.main([*options, "--backends", "torch"])
    assert "torch: prefill" in capsys.readouterr().out
