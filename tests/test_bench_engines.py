"""The scripts that time gdn behind an engine's interface, on a CPU. SGLang's runs in
test_sglang_engine.py; vLLM's kernels run where `tox -e vllm` has installed them, by Triton's
interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn

SIZES = ["--heads", "1/2", "--size", "16", "--prefill", "1x70,5+64", "--batches", "2"]
INTERPRETED = bool(importlib.util.find_spec("vllm")) and os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
    pytest.mark.skipif(torch.cuda.is_available(), reason="it is for a CPU"),
]


def flashinfer_by_torch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor,
    output_final_state: bool, cu_seqlens: Tensor, use_cp: str, backend: str,
) -> Any:  # fmt: skip
    """What FlashInfer computes of a decay, packed tokens and states [V, K]."""
    tokens = (x[None] for x in (q, k, v, g.log(), beta))
    o, state = gdn.gated_delta_net(
        *tokens, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens,
        state_v_first=True, backend="torch",
    )  # fmt: skip
    return o[0], state


def test_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gdn agrees in every row, and so do vLLM's kernels that the interpreter runs. Those of a
    chunked prefill and of a packed decode it does not."""
    script: Any = importlib.import_module("vllm_kernels")
    module: Any = ModuleType("flashinfer.gdn_prefill")
    module.chunk_gated_delta_rule = flashinfer_by_torch
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.gdn_prefill", module)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])  # without stand-ins afterwards
    file = tmp_path / "times.json"
    found = script.main([*SIZES, "--backends", "torch", "--json", str(file)])
    assert list(found.times) == ["prefill 1x70", "prefill 5+64", "decode 2", "verify 2"]
    assert all("gdn torch" in times for times in found.times.values())
    if INTERPRETED:
        assert "triton" in found.times["verify 2"]
        assert "flashinfer" in found.times["prefill 5+64"]
        assert "flashinfer" not in found.times["decode 2"]
    written = json.loads(file.read_text())
    assert {row["row"] for row in written["rows"]} == set(found.times)
    assert all(row["ms"] > 0 for row in written["rows"])


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_a_kernel_that_disagrees_is_not_timed(wrong: float) -> None:
    script: Any = importlib.import_module("vllm_kernels")
    engines: Any = importlib.import_module("engines")

    class Wrong(script.Gdn):  # type: ignore[misc]
        def decode(self, batch: Any, pool: Tensor, out: Tensor) -> None:
            super().decode(batch, pool, out)
            pool[1:] += wrong

        def verify(self, batch: Any, pool: Tensor, out: Tensor) -> None:
            raise RuntimeError("no driver")

    args = engines.parse("", [*SIZES, "--kinds", "decode,verify"])
    layer = engines.Layer(args.heads, args.size, args.device, torch.float32)
    right = script.Gdn(layer, "torch")
    kernels = {"right": right, "triton": Wrong(layer, "torch")}
    comparison = engines.Comparison("vLLM", "vllm", kernels, right, layer)
    comparison.run(script.Work(layer), args)
    assert [list(times) for times in comparison.times.values()] == [["right"], ["right"]]
    off, failed = comparison.refused
    assert off["reason"].startswith("off by")
    assert failed["reason"] == "RuntimeError: no driver"
    assert comparison.means() == []
