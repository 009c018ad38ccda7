"""The suite's device, the rows that its options select, and one comparison per shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import adapters
import pytest
import torch
from shapes import SELECTIONS, Decay, Norm, Selection, expand, make_step_case
from tuning import tune_quickly

import gdn
from gdn.compare.comparison import Comparison, Row
from gdn.compare.decode import DECODE, StepComparison
from gdn.compare.environment import environment
from gdn.compare.roofline import PASSES
from gdn.compare.timing import Timing, gpu_times
from gdn.problem import Call
from gdn.testing import Case, Gates

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PEERS = {peer.name: peer for peer in adapters.register()}
if ON_GPU:
    tune_quickly()


def size(config: pytest.Config) -> str:
    """quick, default or full."""
    return next((name for name in ("quick", "full") if config.getoption(name)), "default")


def selection(config: pytest.Config) -> Selection:
    return SELECTIONS[DEVICE.type, size(config)]


def _selected(config: pytest.Config, option: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names that an option lists; without the option all known names."""
    given = config.getoption(option)
    names = tuple(given.split(",")) if given else tuple(known)
    for name in names:
        if name not in known:
            raise pytest.UsageError(f"--{option} must be of {', '.join(known)}, got {name!r}")
    return names


def selected_backends(config: pytest.Config) -> tuple[str, ...]:
    return _selected(config, "backends", [info.name for info in gdn.list_backends()])


def selected_passes(config: pytest.Config) -> tuple[str, ...]:
    names = _selected(config, "passes", PASSES)
    return tuple(which for which in PASSES if which in names)


def selected_gates(config: pytest.Config) -> tuple[str, ...]:
    given = config.getoption("gates")
    return _selected(config, "gates", get_args(Gates)) if given else selection(config).gates


def selected_decays(config: pytest.Config) -> tuple[str, ...]:
    given = config.getoption("decays")
    return _selected(config, "decays", get_args(Decay)) if given else ("head",)


def selected_norms(config: pytest.Config) -> tuple[str, ...]:
    given = config.getoption("norms")
    return _selected(config, "norms", get_args(Norm)) if given else selection(config).norms


def selected_shapes(config: pytest.Config) -> list[str]:
    try:
        return expand(config.getoption("shapes") or selection(config).shapes)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def selected_steps(config: pytest.Config) -> tuple[list[str], list[int]]:
    """Heads and batch sizes of decode."""
    chosen = selection(config)
    heads, batches = config.getoption("heads"), config.getoption("batches")
    try:
        found = heads.split(",") if heads else list(chosen.decode_heads)
        for pair in found:
            make_step_case(pair, 1, DTYPE)
        return found, [int(n) for n in batches.split(",")] if batches else list(chosen.batches)
    except ValueError as error:
        raise pytest.UsageError(f"--heads or --batches: {error}") from error


@functools.lru_cache(maxsize=1)  # one shape's tensors at a time
def compared(case: Case, backends: tuple[str, ...], passes: tuple[str, ...]) -> Any:
    """A comparison whose rows are checked. Its passes are timed later, each on first use."""
    if passes == (DECODE,):
        comparison: Any = StepComparison(case, DEVICE, backends)  # type: ignore[arg-type]
    else:
        comparison = Comparison(case, DEVICE, backends, passes)
    for row in comparison.rows:
        comparison.check(row)
    return comparison


def find_row(
    config: pytest.Config, case: Case, backend: str, passes: tuple[str, ...]
) -> tuple[Any, Row]:
    """The comparison of a case on the selected backends, and a backend's row of it."""
    comparison = compared(case, selected_backends(config), passes)
    return comparison, next(row for row in comparison.rows if row.backend == backend)


@functools.cache
def about() -> dict[str, Any]:
    return environment(DEVICE)


def conversions(comparison: Any, backend: str, which: str) -> Timing | None:
    """GPU time of an adapter's conversions before and after a forward; None if it has none."""
    if backend not in PEERS or which != "fwd" or not ON_GPU:
        return None
    call = Call(**{"scale": 1.0} | comparison.inputs.plain)
    plan: Any = PEERS[backend].plan(call)
    if not hasattr(plan, "convert"):
        return None
    state = plan.convert(call)["initial_state"]
    runs = {backend: lambda: (plan.convert(call), plan.restore(call, state))}
    return gpu_times(runs, {backend: True}, budget=0.2)[backend]
