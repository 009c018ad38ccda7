"""How a plan gets the functions that launch its kernels: from one of `prebuilt.folders`, or
compiled now and kept in the cache."""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gdn.backend import MissingKernelError

from . import prebuilt
from .kernels import Job, no_compiler, slowest_first

_loaded: dict[str, Callable[..., None]] = {}


def launchers(jobs: Sequence[Job]) -> list[Callable[..., None]]:
    """The functions that launch the kernels of jobs. What no folder has is compiled, and goes to
    the cache. MissingKernelError if there is no compiler."""
    names = [prebuilt.key(kernel.name, statics) for kernel, statics in jobs]
    if compiling := unloaded(jobs):
        if reason := no_compiler():
            raise MissingKernelError(missing_reason(compiling, reason))
        _compile(compiling)
    return [_loaded[name] for name in names]


def compile_all(needed: Sequence[Job], every: Sequence[Job]) -> None:
    """Compile every kernel of a training step that no folder has, if one is missing that is needed
    now: together they take about as long as the slowest one."""
    if missing(needed) and no_compiler() is None:
        _compile(missing(every))


def unloaded(jobs: Sequence[Job]) -> list[Job]:
    """Load kernels. Those that no folder has, or that cannot be loaded."""
    return [job for job in _by_name(jobs).values() if not _load(job)]


def _by_name(jobs: Sequence[Job]) -> dict[str, Job]:
    """Each kernel once."""
    return {prebuilt.key(kernel.name, x): (kernel, x) for kernel, x in jobs}


def _load(job: Job) -> bool:
    """Load a kernel, if a folder has it."""
    kernel, statics = job
    name = prebuilt.key(kernel.name, statics)
    if name in _loaded:
        return True
    for _, library in prebuilt.find_all(kernel.name, statics):
        try:
            _loaded[name] = prebuilt.load(library)
            return True
        except (OSError, RuntimeError) as error:  # the latter is TVM's
            prebuilt.refuse(library, error)
    return False


def _compile(jobs: Sequence[Job]) -> None:
    """Compile kernels into the cache: the slowest one here, the others beside it in processes,
    which first import torch and tilelang. What these fail to build is built here. Without a cache
    they go to a folder that is removed when they are loaded."""
    if not jobs:  # another process has just compiled them
        return
    cache = _writable_cache()
    from .build import BuildError, build

    with tempfile.TemporaryDirectory() as temporary:
        folder = cache or Path(temporary)
        slowest, *others = slowest_first(jobs)
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(build, others, folder, workers=_idle_cores(), fresh=False)
            _build_here(slowest, folder)
            with contextlib.suppress(BuildError, OSError):
                beside.result()
        for job in others:
            _build_here(job, folder)
        for kernel, statics in jobs:
            name = prebuilt.key(kernel.name, statics)
            entry = prebuilt.read_entry(folder / f"{name}.json")
            assert entry is not None
            _loaded[name] = prebuilt.load(folder / entry.file)


def _build_here(job: Job, folder: Path) -> None:
    """Compile a kernel in this process, unless another one has just done so. An import of tilelang
    takes a second, so it waits until it is needed."""
    from .build import import_compiler, turn_to_build

    with turn_to_build(job, folder) as missing:
        if missing:
            import_compiler().build_here(job, folder)


def _idle_cores() -> int:
    """Cores that had no work in the last minute, at least one: other ranks may compile too."""
    return max(1, len(os.sched_getaffinity(0)) - round(os.getloadavg()[0]))


def _writable_cache() -> Path | None:
    """The folder of the cache. If it cannot be written, one that lives as long as this process
    takes the place of TileLang's cache, which an import of tilelang makes."""
    folder = prebuilt.cache_folder()
    if folder is None or _can_write(folder):
        return folder
    os.environ["TILELANG_CACHE_DIR"] = temporary = tempfile.mkdtemp(prefix="gdn-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return prebuilt.cache_folder()


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def missing(jobs: Sequence[Job]) -> list[Job]:
    """Those that no folder has."""
    return [
        (kernel, x) for name, (kernel, x) in _by_name(jobs).items()
        if name not in _loaded and prebuilt.find(kernel.name, x) is None
    ]  # fmt: skip


def missing_reason(jobs: Sequence[Job], reason: str) -> str:
    """Why a call with these missing kernels cannot run, and the command that builds them."""
    names = [prebuilt.full_name(kernel.name, statics) for kernel, statics in jobs]
    refused = (prebuilt.why_refused(kernel.name, statics) for kernel, statics in jobs)
    why = next((f" ({text})" for text in refused if text), "")
    options = " ".join(f"--kernel {shlex.quote(name)}" for name in names)
    return (
        f"{len(jobs)} of its kernels are not prebuilt{why}, and cannot be compiled here "
        f"({reason}); on a machine with a compiler run `gdn build-kernels --out DIR {options}`, "
        f"and here set {prebuilt.VARIABLE}=DIR"
    )


def describe_sources(jobs: Sequence[Job]) -> str:
    """Where the kernels of a call come from, in words."""
    counts: dict[str, int] = {}
    for kernel, statics in jobs:
        found = prebuilt.find(kernel.name, statics)
        where = f"in {found[0]}" if found else "to compile"
        counts[where] = counts.get(where, 0) + 1
    return "kernels: " + ", ".join(f"{n} {where}" for where, n in counts.items())
