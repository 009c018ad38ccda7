"""How long calls take and how long they must: clocks, the work in a call, ceilings, environment.

Two clocks, kept apart. GPU time is that of CUDA graph replays (of plain launches, between events,
where a backend cannot be captured), with the L2 cache flushed before each. Wall time is what a
caller waits for one eager call and the device's answer. Both interleave what they compare, and
report the median.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gdn.problem import CHUNK
from gdn.testing import Case

Run = Callable[[], object]


class Timing(NamedTuple):
    """Milliseconds of one call: the median of `repeats`, and half their interquartile range.

    clock is "graph" (CUDA graph replay), "events" (plain launches, gaps included) or "wall".
    """

    ms: float
    spread: float
    repeats: int
    clock: str


def _timing(samples: list[float], clock: str) -> Timing:
    low, _, high = statistics.quantiles(samples, n=4)
    return Timing(statistics.median(samples), (high - low) / 2, len(samples), clock)


def _rounds(seconds_a_round: float, budget: float) -> int:
    return max(5, min(200, round(budget / max(seconds_a_round, 1e-6))))


def wall_times(
    runs: Mapping[str, Run], device: torch.device, budget: float = 2.0
) -> dict[str, Timing]:
    """Wall time of each run, in about `budget` seconds altogether (or five rounds, if longer)."""

    def once(run: Run) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for run in runs.values():
        once(run)
    rounds = _rounds(sum(once(run) for run in runs.values()), budget)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(1e3 * once(run))
    return {name: _timing(times, "wall") for name, times in samples.items()}


def capture(run: Run) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one run, after a warm-up on a side stream."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def gpu_times(
    runs: Mapping[str, Run], graphed: Mapping[str, bool], budget: float = 1.0
) -> dict[str, Timing]:
    """GPU time of each run on the current device; `graphed` says which are captured in a graph."""
    launches: dict[str, Run] = {}
    for name, run in runs.items():
        launches[name] = capture(run).replay if graphed[name] else run
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cache = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda")

    Event: Any = torch.cuda.Event  # untyped in torch

    def once(launch: Run) -> float:
        start, end = (Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        launch()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    for launch in launches.values():
        once(launch)
    rounds = _rounds(sum(once(launch) for launch in launches.values()) / 1e3, budget)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, launch in launches.items():
            samples[name].append(once(launch))
    return {
        name: _timing(times, "graph" if graphed[name] else "events")
        for name, times in samples.items()
    }


class Work(NamedTuple):
    """The least that any chunked implementation does: floating-point operations, bytes moved."""

    flops: float
    bytes: float


def work(case: Case, backward: bool) -> Work:
    """The work in one forward call, or with `backward` in one forward and backward.

    Operations, per chunk of C tokens and value head: K S, Q S and K^T U take 2 C K V each, K K^T
    and Q K^T 2 C^2 K, applying the inverse and P U 2 C^2 V, the inverse C^3 / 2; backward thrice
    that. Bytes: every input is read once and every output written once; backward reads q, k, v, g,
    beta and the gradients of o and of the final state, and writes a gradient for each input.
    """
    lengths = case.lengths if case.lengths is not None else (case.T,) * case.B
    chunks = sum(-(-length // CHUNK) for length in lengths)
    K, V, C = case.K, case.V, CHUNK
    a_chunk = 6 * C * K * V + 4 * C * C * (K + V) + C**3 / 2
    flops = chunks * case.HV * a_chunk
    tokens, size = sum(lengths), case.dtype.itemsize
    qk, vo, gates = 2 * case.H * K * size, case.HV * V * size, 2 * case.HV * 4
    state = len(lengths) * case.HV * K * V * 4
    states = state * (1 + case.initial_state)
    moved = tokens * (qk + 2 * vo + gates) + states
    if backward:
        flops *= 4
        moved += tokens * (2 * qk + 3 * vo + 2 * gates) + 2 * states
    return Work(float(flops), float(moved))


class Ceilings(NamedTuple):
    """Measured rates of a device: operations a second in a matrix product, bytes a second in a
    copy."""

    flops: float
    bytes: float

    def floor_ms(self, work: Work) -> float:
        """The least time that the work can take."""
        return 1e3 * max(work.flops / self.flops, work.bytes / self.bytes)


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure them, on random numbers: a product of `dtype` matrices, and the copy with a changed
    sign of an array larger than any cache (a plain copy may go through a slower engine)."""
    gpu = device.type == "cuda"
    n, size = (8192, 2**28) if gpu else (1536, 2**25)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {
        "product": lambda: a @ b,
        "copy": lambda: torch.neg(source, out=target),
    }
    if gpu:
        with torch.cuda.device(device):
            times = gpu_times(runs, dict.fromkeys(runs, True))
    else:
        times = wall_times(runs, device)
    seconds = {name: timing.ms / 1e3 for name, timing in times.items()}
    return Ceilings(2 * n**3 / seconds["product"], 2 * source.nbytes / seconds["copy"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that gdn runs from, "-dirty" if changed since, or None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on: versions, device, commit, command."""
    packages = ("gdn", "torch", "triton", "tilelang", "fla-core", "flash-qla")
    return {
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "commit": commit(),
        "command": " ".join(["gdn", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
