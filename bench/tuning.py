"""Triton compiles the configurations of a kernel that it tunes, dozens in peers, one after another,
and times each for an eighth of a second. Here they compile side by side before, and are timed for a
quarter of that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

THREADS = 4
"""More do not help much: a part of each compile holds Python's lock."""
MILLISECONDS = {"warmup": 5, "rep": 25}
"""Of a configuration; Triton's own are 25 and 100. The kernels take 0.01 to 5 ms."""
Prune = Callable[[Any, dict[str, Any]], list[Any]]


def tune_quickly() -> None:
    """From now on Triton compiles the configurations of a kernel side by side in this process, and
    times each briefly. Nothing changes where it is not installed, or older than 3.5."""
    with contextlib.suppress(ImportError):
        from triton.runtime import driver
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.autotuner import Autotuner

        pool = ThreadPoolExecutor(THREADS)
        make_mode = partial(AsyncCompileMode, pool, ignore_errors=True)
        Autotuner.prune_configs = compiling(Autotuner.prune_configs, make_mode)
        Autotuner.do_bench = property(timing_briefly(lambda: driver.active.get_benchmarker()))


def timing_briefly(find_timer: Callable[[], Any]) -> Callable[[Any], Any]:
    """`Autotuner.do_bench`, the function that times a configuration: the tuner's own, if it has
    one, else the driver's."""
    return lambda tuner: tuner._do_bench or partial(find_timer(), **MILLISECONDS)


def compiling(prune: Prune, mode: Callable[[], Any]) -> Prune:
    """`Autotuner.prune_configs`, which chooses the configurations to time, and then compiles them.
    mode: a context in which a kernel's `run` with warmup=True only begins to compile; its end waits
    for all. A configuration that does not compile fails again when it is timed."""

    def prune_and_compile(tuner: Any, options: dict[str, Any]) -> list[Any]:
        chosen = prune(tuner, options)
        if len(chosen) > 1:
            with mode():
                for config in chosen:
                    given = tuner.nargs | options | config.all_kwargs()
                    tuner.fn.run(**given | {"warmup": True})
        return chosen

    return prune_and_compile
