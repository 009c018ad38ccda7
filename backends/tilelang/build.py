"""Builds kernels into a folder, side by side in processes of their own.

Threads would compile one kernel after another, since TileLang's passes hold Python's lock. A
process runs `serve`: it reads a kernel a line, as `NAME(OPTIONS)`, and answers each with a line of
JSON: the error, or an empty text.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import prebuilt, toolkit
from .kernels import KERNELS, Job, no_nvcc, slowest_first
from .tile.pool_kind import PoolKind
from .tile.thread_shape import ThreadShape
from .turn import take_turn

_TUPLES: dict[str, Any] = {"PoolKind": PoolKind, "ThreadShape": ThreadShape}


_PROCESS = f"""
import gc, sys
gc.disable()  # imports of torch and tilelang take a sixth less
from {__name__} import serve
serve(sys.argv[1])
"""


class BuildError(RuntimeError):
    """A kernel did not compile."""


def write_job(job: Job) -> str:
    """`NAME(OPTIONS)`."""
    kernel, statics = job
    return prebuilt.full_name(kernel.name, statics)


def parse_job(text: str) -> Job:
    """The job that `write_job` wrote. ValueError if the text is none."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        assert isinstance(call, ast.Call)
        statics = {x.arg: _value(x.value) for x in call.keywords}
        return KERNELS[ast.unparse(call.func)], {str(name): x for name, x in statics.items()}
    except (SyntaxError, AssertionError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"a kernel must be like scan(K=128, ...) with a name of {', '.join(KERNELS)}, got "
            f"{text!r}; copy it from the error that asked for it"
        ) from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return _TUPLES[ast.unparse(node.func)](
            **{str(x.arg): ast.literal_eval(x.value) for x in node.keywords}
        )
    return ast.literal_eval(node)


def build(
    jobs: Sequence[Job], folder: Path, workers: int = 0, fresh: bool = True,
    done: Callable[[str], object] = str,
) -> None:  # fmt: skip
    """Build kernels into a folder, with so many processes (0: one a core). Those that are there
    already are kept. fresh: TileLang's own cache is not used. done: called with the name of each
    kernel that is there. BuildError, when all others are built, if one does not compile."""
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    failed: list[str] = []
    for job in slowest_first({write_job(job): job for job in jobs}.values()):
        if is_built(job, folder):
            done(job[0].name)
        else:
            todo.put(job)
    if todo.empty():
        return
    if reason := no_nvcc():
        raise BuildError(f"{todo.qsize()} kernels cannot be compiled here: {reason}")
    folder.mkdir(parents=True, exist_ok=True)

    def work() -> None:
        with contextlib.ExitStack() as stack:
            ask = None
            while True:
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    return
                with turn_to_build(job, folder) as missing:
                    if missing:
                        ask = ask or stack.enter_context(_worker(folder, fresh))
                    error = ask(write_job(job)) if ask and missing else ""
                if error == "":
                    done(job[0].name)
                    continue
                failed.append(f"{write_job(job)}: {error or 'its process ended'}")
                if error is None:
                    return

    wanted = min(todo.qsize(), workers or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(wanted) as pool:
        running = [pool.submit(work) for _ in range(wanted)]
        try:
            for one in running:
                one.result()
        except BaseException:
            with contextlib.suppress(queue.Empty):  # begin no other kernel
                while True:
                    todo.get_nowait()
            raise
    if failed:
        left = f"\n{todo.qsize()} more were not tried" if todo.qsize() else ""
        raise BuildError("\n".join(failed) + left)


def import_compiler() -> Any:
    """The module `compile`. It imports tilelang, which makes so many objects that Python's garbage
    collection takes 0.4 of 1.1 s; it is off meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        from . import compile
    finally:
        if enabled:
            gc.enable()
    return compile


def is_built(job: Job, folder: Path) -> bool:
    """Whether a folder has a kernel of these sources that this machine can load, and that its nvcc
    built, if it has one: another kernel would be refused where nvcc fits the driver."""
    kernel, statics = job
    try:
        entry = prebuilt.read_entry(folder / f"{prebuilt.key(kernel.name, statics)}.json")
        if entry is None or folder / entry.file in prebuilt.unloadable:
            return False
    except prebuilt.KernelFileError:
        return False
    if now := toolkit.nvcc_version():  # it may build for machines with a newer driver
        return entry.cuda in (0, now)
    driver = toolkit.driver()
    return driver is None or entry.cuda <= driver


@contextlib.contextmanager
def turn_to_build(job: Job, folder: Path) -> Iterator[bool]:
    """Let no other process build this kernel into this folder meanwhile. Gives whether it is still
    missing, after a process that was building it is done."""
    kernel, statics = job
    with take_turn(folder, prebuilt.key(kernel.name, statics)):
        yield not is_built(job, folder)


@contextlib.contextmanager
def _worker(folder: Path, fresh: bool) -> Iterator[Callable[[str], str | None]]:
    """A function that has a process build a kernel, and returns the error or ""; None if the
    process has ended."""
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    if fresh:
        environment["TILELANG_DISABLE_CACHE"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-c", _PROCESS, str(folder)],
        env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    given, answers = process.stdin, process.stdout
    assert given is not None
    assert answers is not None

    def ask(text: str) -> str | None:
        with contextlib.suppress(BrokenPipeError):
            print(text, file=given, flush=True)
        answer = answers.readline()
        return str(json.loads(answer)) if answer else None

    with process, contextlib.suppress(BrokenPipeError):
        yield ask
        given.close()


def serve(folder: str) -> None:
    """Answer the lines on stdin. What compilers print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    build_here = import_compiler().build_here
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        error = ""
        try:
            build_here(parse_job(line), Path(folder))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        try:
            print(json.dumps(error), file=answers, flush=True)
        except BrokenPipeError:  # nobody waits for it any more
            return
