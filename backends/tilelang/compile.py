"""Compiling a kernel once for all calls of a kind, for Hopper whether or not there is a device."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")

import tilelang
from tilelang import PassConfigKey

TARGET = {"kind": "cuda", "arch": "sm_90a"}
"""Always named, so that a cache filled without a device is hit on one."""
_READING = Lock()
"""Builders are read one after another: CPython 3.11 counts the depth of `ast.parse` once for all
threads and raises a SystemError when two of them are at it. Compiling, which takes the time, is
not."""
_FAST = {
    PassConfigKey.TL_ENABLE_FAST_MATH: True,
    PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,  # kernels check what could be outside
}
_OWN_BARRIERS = _FAST | {
    PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    PassConfigKey.TL_DISABLE_SHARED_MEMORY_REUSE: True,
    PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK: True,  # it cannot tell that nobody reads the result
}


def compile_together(*jobs: tuple[Any, dict[str, Any]]) -> list[Any]:
    """The kernels of several builders, each with its static options, compiled side by side."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: job[0](**job[1]), jobs))


def launchers(kernels: list[Any]) -> list[Callable[..., None]]:
    """What launches compiled kernels: TVM's own function objects, without the 4 us of work on the
    host that TileLang adds for outputs that it would allocate."""
    return [kernel.adapter.get_exportable_executable()["main"] for kernel in kernels]


def kernel(build: Callable[..., Any] | None = None, *, own_barriers: bool = False) -> Any:
    """Turn a builder of a TileLang kernel, from static sizes and options, into one that returns it
    compiled.

    Compiled kernels are remembered in the process, and by TileLang on disk. own_barriers: the
    kernel gives its warps different work, places every barrier itself, and no two of its buffers
    may share memory.
    """
    if build is None:
        return functools.partial(kernel, own_barriers=own_barriers)

    @functools.cache
    def compiled(**statics: Any) -> Any:
        with _READING:
            function = build(**statics)
        return tilelang.compile(
            function, target=TARGET, execution_backend="tvm_ffi",
            pass_configs=_OWN_BARRIERS if own_barriers else _FAST,
        )  # fmt: skip

    compiled.build = build  # type: ignore[attr-defined]
    return compiled
