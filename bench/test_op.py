"""Every backend that runs here, on Qwen3.5's heads, forward and with backward; only if it agrees.

Wall time by pytest-benchmark; `gdn compare` adds GPU time and the roofline.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import gdn
from gdn import compare
from gdn.testing import Case

LENGTHS = {"cpu": (512, 2048), "cuda": (2048, 8192)}
CASE = Case("model", H=16, HV=32, K=128, V=128, fused=True, gates="model", initial_state=False)


@functools.cache
def truth(case: Case, device: torch.device) -> dict[str, Tensor]:
    return compare.truth(case, device)


@pytest.mark.parametrize("backend", [info.name for info in gdn.list_backends()])
@pytest.mark.parametrize("which", compare.PASSES)
@pytest.mark.parametrize("length", [0, 1], ids=["short", "long"])
def test_op(
    record: Callable[..., None], device: torch.device, backend: str, length: int, which: str
) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = replace(CASE, T=LENGTHS[device.type][length], dtype=dtype)
    (row,) = compare.make_rows([backend], case, device)
    if which in row.refusals:
        pytest.skip("; ".join(row.refusals[which]))
    compare.call_first(row, case, device)
    checked = compare.shortened(case)
    compare.check(row, checked, truth(checked, device), device)
    assert row.failure is None
    prepared = compare.prepare(case, device, which)
    worst = max(row.errors.values())
    columns = {"T": case.T, "pass": which, "backend": backend, "path": row.paths[which]}
    record(lambda: compare.run(backend, *prepared), 10, **columns, error=f"{worst:.1e}")
