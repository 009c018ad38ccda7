"""What several test modules share: skips of calls that a backend does not claim, cuts of inputs,
and comparisons."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn
from gdn import dispatch
from gdn.testing import TOLERANCE, with_gradients
from gdn.testing.check import assert_close, reasons_against, run, truth

__all__ = [
    "FRAMEWORKS", "TOKENS", "assert_close", "capabilities_of", "close", "cut", "documented_code",
    "may_fail_with_fla", "poisoned_memory", "reasons_against", "require", "run", "train", "truth",
]  # fmt: skip

FRAMEWORKS = Path(__file__).resolve().parents[1] / "docs" / "frameworks.md"

TOKENS = ("q", "k", "v", "g", "beta")
"""The tensors with a row for each token."""


def capabilities_of(backend: str) -> gdn.Capabilities:
    """What a backend claims."""
    return next(info.capabilities for info in gdn.list_backends() if info.name == backend)


def require(backend: str, inputs: dict[str, Any], prefill: bool = False) -> None:
    """Skip the test unless the backend claims this call; `test_refusals` tests that it refuses
    it."""
    if reasons := reasons_against(backend, inputs, prefill):
        pytest.skip("; ".join(reasons))


def train(backend: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with gradients where the backend claims them for this call, else as they are."""
    trained = with_gradients(inputs)
    return inputs if reasons_against(backend, trained) else trained


def may_fail_with_fla(request: pytest.FixtureRequest, backend: str, device: str) -> None:
    """fla's decay per channel failed here on a GPU."""
    if backend == "fla" and device == "cuda":
        reason = "failed in the first run on a GPU; docs/log/open.md"
        mark = pytest.mark.xfail(reason=reason, raises=AssertionError, strict=False)
        request.applymarker(mark)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory is NaN, or the largest integer."""
    for device in ("cpu", "cuda"):  # these two would return memory as it is
        monkeypatch.delattr(torch._C._dynamo.guards, f"_empty_strided_{device}", raising=False)
    monkeypatch.setattr(dispatch, "_chosen", {})
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        yield
    torch.use_deterministic_algorithms(False)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Equal within the tolerance of `dtype`, compared in float64."""
    a, b = a.double(), b.double()
    torch.testing.assert_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def cut(inputs: dict[str, Any], start: int, end: int, **changes: Any) -> dict[str, Any]:
    """Tokens start to end of dense inputs."""
    return inputs | {name: inputs[name][:, start:end] for name in TOKENS} | changes


def documented_code() -> dict[str, str]:
    """The Python of each section of docs/frameworks.md that has any, by the section's title."""
    sections = re.split(r"^## ", FRAMEWORKS.read_text(), flags=re.MULTILINE)[1:]
    code = {
        x.split("\n")[0]: "".join(re.findall(r"```python\n(.*?)```", x, re.S)) for x in sections
    }
    return {title: lines for title, lines in code.items() if lines}


def compile_together(*jobs: tuple[Any, dict[str, Any]]) -> list[Any]:
    """Kernels of TileLang, each with its static options, compiled in parallel."""
    with ThreadPoolExecutor(max(len(jobs), 1)) as pool:
        return list(pool.map(lambda job: job[0](**job[1]), jobs))
