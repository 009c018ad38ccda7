"""GPU time, wall time and peak memory of calls.

GPU time is measured on CUDA graph replays. A call that cannot be captured is measured on plain
launches between CUDA events. The L2 cache is flushed before each. Wall time is the time of one
eager call, until the device has finished. Both interleave the runs that they compare, and report
the median.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Run = Callable[[], object]


LEAST_ROUNDS, MOST_ROUNDS = 3, 200


class Timing(NamedTuple):
    """Milliseconds of one call: the median of `repeats`, and half their interquartile range.

    clock is "graph" (CUDA graph replay), "events" (plain launches, gaps included), "difference"
    (of the medians of two other timings) or "wall".
    """

    ms: float
    spread: float
    repeats: int
    clock: str

    def less(self, other: Timing) -> Timing:
        """This timing minus the other one."""
        spread, repeats = self.spread + other.spread, min(self.repeats, other.repeats)
        return Timing(self.ms - other.ms, spread, repeats, "difference")


def _timing(samples: list[float], clock: str) -> Timing:
    low, _, high = statistics.quantiles(samples, n=4)
    return Timing(statistics.median(samples), (high - low) / 2, len(samples), clock)


def rounds(ms: float, budget: float) -> int:
    """How often to repeat a call of `ms` milliseconds within `budget` seconds."""
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, round(1e3 * budget / max(ms, 1e-3))))


def _interleaved(
    runs: Mapping[str, Run], once: Callable[[Run], float], budget: float
) -> dict[str, list[float]]:
    """Samples of each run in milliseconds, taken in turns. Every run gets an equal share of the
    budget: a slow run is repeated less often, and takes no time from the others."""
    for run in runs.values():
        once(run)
    share = budget / max(1, len(runs))
    wanted = {name: rounds(once(run), share) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(max(wanted.values(), default=0)):
        for name, run in runs.items():
            if turn < wanted[name]:
                samples[name].append(once(run))
    return samples


def wall_times(
    runs: Mapping[str, Run], device: torch.device, budget: float = 2.0
) -> dict[str, Timing]:
    """Wall time of each run, in about `budget` seconds altogether (or three rounds, if longer)."""

    def once(run: Run) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    found = _interleaved(runs, once, budget)
    return {name: _timing(samples, "wall") for name, samples in found.items()}


@functools.cache
def capture_stream(device: int) -> Any:
    """The stream on which graphs of this device are captured. Autograd runs a backward on the
    stream of its forward, so the forward of a captured backward must run on this stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def capture(run: Run, mode: str = "global") -> torch.cuda.CUDAGraph:
    """A CUDA graph of one run, after a warm-up on the stream that it is captured on. mode:
    `capture_error_mode` of `torch.cuda.graph`, "thread_local" where NCCL's own threads may look at
    events meanwhile."""
    stream = capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        run()
    return graph


def gpu_times(
    runs: Mapping[str, Run], graphed: Mapping[str, bool], budget: float = 1.0
) -> dict[str, Timing]:
    """GPU time of each run on the current device. `graphed` says which runs to capture in a graph.
    If a capture fails, plain launches are timed, and the clock is "events"."""
    launches, clocks = dict(runs), dict.fromkeys(runs, "events")
    for name in (name for name in runs if graphed[name]):
        try:
            launches[name] = capture(runs[name]).replay
            clocks[name] = "graph"
        except Exception:  # a peer may synchronise or allocate in ways that graphs do not allow
            torch.cuda.synchronize()
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

    found = _interleaved(launches, once, budget)
    return {name: _timing(samples, clocks[name]) for name, samples in found.items()}


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Peak bytes that one run allocates beyond what was allocated before, its results included;
    None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
