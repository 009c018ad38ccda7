"""Compiles a kernel once for all calls of a kind, for Hopper, on machines without a GPU too."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")

import tilelang
from tilelang import PassConfigKey
from tilelang.contrib import nvcc
from tilelang.contrib.cc import get_cplus_compiler

from . import prebuilt
from .headers import write_short_headers
from .parsing import until_parsed_alone
from .prover import without_integers
from .toolkit import nvcc_version

TARGET = {"kind": "cuda", "arch": "sm_90a"}
"""Always named, never guessed from the device: a cache filled without a GPU then serves one."""
_BUILD_LOCK = Lock()
"""Builders run one after another, since all of them parse Python (see `parsing.py`).
Compiling takes most of the time and runs in parallel."""
_PATCH_LOCK = Lock()
_patched: list[Any] = []
"""What `nvcc.compile_cuda` was for each thread that compiles: TileLang's for the first."""
_FAST = {
    PassConfigKey.TL_ENABLE_FAST_MATH: True,
    PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,  # kernels check their bounds
}
_OWN_BARRIERS = _FAST | {
    PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    PassConfigKey.TL_DISABLE_SHARED_MEMORY_REUSE: True,
    PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK: True,  # it warns of reads whose result is not used
}


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
            # where TileLang places barriers, it needs Z3 for the number of threads that arrive
            with without_integers() if own_barriers else nullcontext():
                return tilelang.compile(
                    function, target=TARGET, execution_backend="tvm_ffi",
                    pass_configs=_OWN_BARRIERS if own_barriers else _FAST,
                    # the name of a kernel in TileLang's cache does not depend on nvcc otherwise
                    compile_flags=[f"-DGDN_NVCC={nvcc_version(nvcc.get_nvcc_compiler())}"],
                )  # fmt: skip

        return until_parsed_alone(make)

    compiled.build = build  # type: ignore[attr-defined]
    return compiled


def build_here(job: Any, folder: Path) -> None:
    """Compile a kernel in this process, and add it to a folder."""
    build, statics = job
    with _without_lines():
        compiled = build(**statics)
    arguments = _arguments_of(compiled.prim_func)
    library = _library_of(compiled)
    cuda = nvcc_version(nvcc.get_nvcc_compiler())
    prebuilt.write_entry(folder, build.name, statics, arguments, library, cuda)


def _library_of(compiled: Any) -> bytes:
    """The shared library of a compiled kernel: host function and code for the GPU. TileLang's cache
    has it, or it is linked now."""
    place = getattr(compiled, "_tilelang_cache_path", None)
    if place is not None and (file := Path(place, "executable.so")).exists():
        return file.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "executable.so")
        compiled.adapter.get_exportable_executable().export_library(str(file))
        return file.read_bytes()


def _arguments_of(function: Any) -> list[str]:
    """What a kernel is launched with: "float32" for a number, and "float32[4]" for a tensor of 4
    dimensions."""
    buffers = (function.buffer_map.get(x) for x in function.params)
    return [
        str(x.dtype) if buffer is None else f"{buffer.dtype}[{len(buffer.shape)}]"
        for x, buffer in zip(function.params, buffers, strict=True)
    ]


@contextmanager
def _without_lines() -> Iterator[None]:
    """Compile without line numbers, which make a kernel's code four times as large. What other
    threads compile meanwhile has none either."""
    with _PATCH_LOCK:
        _patched.append(nvcc.compile_cuda)
        nvcc.compile_cuda = _compile_cuda
    try:
        yield
    finally:
        with _PATCH_LOCK:
            if len(_patched) == 1:
                nvcc.compile_cuda = _patched[0]
            _patched.pop()


def _compile_cuda(
    code: str, target_format: str = "cubin", arch: Any = None, options: Any = None, **_: Any
) -> bytearray:
    """In place of TileLang's function: compile a source by nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.cu"), Path(folder, "kernel.out")
        source.write_text(code)
        command = [nvcc.get_nvcc_compiler(), f"-ccbin={get_cplus_compiler()}", "-O3", "-w"]
        short = write_short_headers(code, Path(folder, "headers"))
        others = [f"--{target_format}", *(arch or []), *(options or [])]
        others += ["-o", str(result), str(source)]
        environment = nvcc.get_nvcc_subprocess_env()
        for headers in [short, []] if short else [[]]:  # again with all, if some are missing
            whole = command + headers + others
            done = subprocess.run(whole, env=environment, capture_output=True, text=True)
            if not done.returncode:
                return bytearray(result.read_bytes())
        raise RuntimeError(f"{' '.join(whole)}\n{done.stderr}")
