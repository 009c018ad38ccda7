"""Where the host's time of a `tilelang` call goes: its launches, each by itself, and the rest.

    python bench/host_time.py                      forward, and a decode step
    python bench/host_time.py --import-tilelang    in a process that has imported tilelang first

The calls are those of `test_dispatch.py`, on one chunk or one token, where the host takes longer
than the GPU. The launches are those of one call, made again with its arguments.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gdn.backends.tilelang.decode import plan as decode
from gdn.backends.tilelang.forward import plan as forward
from gdn.backends.tilelang.kernels import Job
from test_dispatch import make_run

from gdn import dispatch

ROUNDS, CALLS = 5, 100


class Launch(NamedTuple):
    """A launch that a call has made."""

    kernel: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]

    def again(self) -> None:
        self.function(*self.arguments)


def median_us(call: Callable[[], object]) -> float:
    """The host's time of a call, the least of the medians of rounds. The host waits for the GPU
    between rounds alone."""
    medians = []
    for _ in range(ROUNDS):
        times = []
        for _ in range(CALLS):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        medians.append(1e6 * statistics.median(times))
    return min(medians)


def record_launches() -> list[Launch]:
    """A list that gets the launches of calls whose plans are made from now on."""
    launched: list[Launch] = []
    find = forward.launchers

    def wrap(kernel: str, function: Callable[..., None]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            launched.append(Launch(kernel, function, arguments))
            function(*arguments)

        return launch

    def find_and_wrap(jobs: Sequence[Job]) -> list[Callable[..., None]]:
        return [wrap(job[0].name, found) for job, found in zip(jobs, find(jobs), strict=True)]

    for plan in (forward, decode):
        plan.launchers = find_and_wrap
    dispatch._chosen.clear()
    return launched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--import-tilelang", action="store_true")
    if parser.parse_args().import_tilelang:
        importlib.import_module("tilelang")
    runs = {work: make_run(work, "tilelang") for work in ("forward", "decode")}
    whole = {}
    for work, run in runs.items():
        run()
        whole[work] = median_us(run)
    launched = record_launches()
    print(f"tilelang is {'' if 'tilelang' in sys.modules else 'not '}imported")
    for work, run in runs.items():
        launched.clear()
        run()
        parts = [(launch.kernel, median_us(launch.again)) for launch in list(launched)]
        print(f"{work}: {whole[work]:.1f} us")
        for name, us in (*parts, ("the rest", whole[work] - sum(us for _, us in parts))):
            print(f"    {name:20} {us:5.1f}")


if __name__ == "__main__":
    main()
