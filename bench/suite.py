"""Where the suite runs, what its options select, and one measured comparison a shape."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch

import gdn
from gdn import measure
from gdn.compare import Comparison
from gdn.compare_step import DECODE, StepComparison
from gdn.problem import Call
from gdn.testing import Case
from gdn.work import PASSES

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PEERS = {peer.name: peer for peer in adapters.register()}


def size(config: pytest.Config) -> str:
    """quick, default or full."""
    return next((name for name in ("quick", "full") if config.getoption(name)), "default")


def selected_backends(config: pytest.Config) -> list[str]:
    every, asked = [info.name for info in gdn.list_backends()], config.getoption("backends")
    names = asked.split(",") if asked else every
    for name in names:
        gdn.registry.find_backend(name)  # raises, with the near misses
    return names


def selected_passes(config: pytest.Config) -> tuple[str, ...]:
    return tuple(which for which in PASSES if which in config.getoption("passes").split(","))


@functools.lru_cache(maxsize=1)  # one shape's tensors at a time
def compared(case: Case, backends: tuple[str, ...], passes: tuple[str, ...]) -> Any:
    """A comparison whose rows have been checked. Its passes are timed when first asked for."""
    if passes == (DECODE,):
        comparison: Any = StepComparison(case, DEVICE, backends)  # type: ignore[arg-type]
    else:
        comparison = Comparison(case, DEVICE, backends, passes)
    for row in comparison.rows:
        comparison.check(row)
    return comparison


@functools.cache
def about() -> dict[str, Any]:
    return measure.environment(DEVICE)


def conversions(comparison: Any, backend: str, which: str) -> measure.Timing | None:
    """GPU time of an adapter's conversions alone, before a forward and after it, if it has any."""
    peer: Any = PEERS.get(backend)
    if not hasattr(peer, "convert") or which != "fwd" or not ON_GPU:
        return None
    call = Call(**{"scale": 1.0} | comparison.inputs.plain)
    state = peer.convert(call)["initial_state"]
    runs = {backend: lambda: (peer.convert(call), peer.restore(call, state))}
    return measure.gpu_times(runs, {backend: True}, budget=0.2)[backend]
