"""Forward, backward, and both, of every backend that agrees with float64 at that size: GPU time,
interleaved between backends, and eager wall time."""

from __future__ import annotations

from typing import Any

import pytest
from shapes import CONDITIONS, make_case
from suite import DTYPE, selected_passes

from gdn.compare.roofline import least_work


def test_prefill(
    request: pytest.FixtureRequest,
    record_pass: Any,
    shape: str,
    gates: Any,
    norm: Any,
    decay: Any,
    which: str,
    backend: str,
) -> None:
    if (norm, decay) not in CONDITIONS:
        pytest.skip("with a decay per channel all is fused")
    case, passes = make_case(shape, gates, DTYPE, norm, decay), selected_passes(request.config)
    least = least_work(case, which)
    record_pass(case, backend, passes, which, least, decay, kind="prefill", norm=norm)
