"""Compiles a kernel once for all calls of a kind, for Hopper, on machines without a GPU too."""

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
"""Always named, never guessed from the device: a cache filled without a GPU then serves one."""
_BUILD_LOCK = Lock()
"""Builders run one after another, since all of them parse Python (see `_PARSED_TOGETHER`).
Compiling takes most of the time and runs in parallel."""
_PARSED_TOGETHER = "AST constructor recursion depth mismatch"
"""CPython counts the depth of `ast.parse` for all threads together and raises a SystemError with
this text if one parses while another one does. TileLang also parses while it lowers."""
_ATTEMPTS = 8
_FAST = {
    PassConfigKey.TL_ENABLE_FAST_MATH: True,
    PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,  # kernels check their bounds
}
_OWN_BARRIERS = _FAST | {
    PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    PassConfigKey.TL_DISABLE_SHARED_MEMORY_REUSE: True,
    PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK: True,  # it warns of reads whose result is not used
}


def compile_together(*jobs: tuple[Any, dict[str, Any]]) -> list[Any]:
    """Compile the kernels of several builders, each with its static options, in parallel."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: job[0](**job[1]), jobs))


def _until_parsed_alone(make: Callable[[], Any]) -> Any:
    """The result of `make`, which runs again if another thread parses at the same time."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return make()
        except Exception as error:  # TVM passes a SystemError on as an error of its own
            if _PARSED_TOGETHER not in str(error):
                raise
    return make()


def launchers(kernels: list[Any]) -> list[Callable[..., None]]:
    """The functions that launch compiled kernels: TVM's own. TileLang's wrapper spends 4 us more on
    the host on outputs that it would allocate."""
    return [kernel.adapter.get_exportable_executable()["main"] for kernel in kernels]


def kernel(build: Callable[..., Any] | None = None, *, own_barriers: bool = False) -> Any:
    """Decorate a function that builds a TileLang kernel from static sizes and options: it then
    returns the kernel compiled.

    Compiled kernels are cached in the process, and by TileLang on disk. own_barriers: the warps of
    the kernel have different roles, the kernel places every barrier itself, and TileLang must not
    let two of its buffers share memory.
    """
    if build is None:
        return functools.partial(kernel, own_barriers=own_barriers)

    @functools.cache
    def compiled(**statics: Any) -> Any:
        def make() -> Any:
            with _BUILD_LOCK:
                function = build(**statics)
            return tilelang.compile(
                function, target=TARGET, execution_backend="tvm_ffi",
                pass_configs=_OWN_BARRIERS if own_barriers else _FAST,
            )  # fmt: skip

        return _until_parsed_alone(make)

    compiled.build = build  # type: ignore[attr-defined]
    return compiled
