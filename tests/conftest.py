"""Fixtures of the suite: devices, the backends under test, and a registry that is restored."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from slow import SLOW

import gdn
from gdn import dispatch, registry


def take_turns(worker: str, gpus: list[str]) -> str:
    """CUDA_VISIBLE_DEVICES of a worker of xdist: all GPUs, each worker begins with the next one."""
    first = int(worker.removeprefix("gw")) % len(gpus)
    return ",".join(gpus[first:] + gpus[:first])


if "PYTEST_XDIST_WORKER" in os.environ and (count := torch.cuda.device_count()) > 1:
    # before the driver reads the variable; counting does not start it
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = take_turns(os.environ["PYTEST_XDIST_WORKER"], gpus)
if not torch.cuda.is_available():
    # before Triton is imported and the triton backend reads the variable
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = [info.name for info in gdn.list_backends()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
            elif SLOW.search(item.nodeid) and os.environ.get("GDN_SLOW_TESTS") != "1":
                item.add_marker(pytest.mark.skip(reason="slow; GDN_SLOW_TESTS=1 or a GPU runs it"))


def pytest_configure() -> None:
    """Keep import-time warnings and autotuning of peers out of the suite, and interpret faster."""
    os.environ.pop("GDN_BACKEND", None)
    os.environ.pop("GDN_BATCH_INVARIANT", None)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # with more, threads of all workers compete: 20 times slower
    _patch_once()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import fla.ops.gated_delta_rule  # noqa: F401
            from triton.runtime.autotuner import Autotuner
        except ImportError:
            return
    # one configuration per kernel, not dozens: the one that needs the least shared memory
    every = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, kwargs: [min(every(self, kwargs), key=_footprint)]


def _patch_once() -> None:
    """A device function that Triton interprets patches Triton's language at every call, which takes
    a third of the time. Once for a launch and a module is enough."""
    try:
        from triton.runtime.interpreter import GridExecutor, InterpretedFunction, _patch_lang
    except ImportError:
        return
    patched: set[int] = set()
    every = GridExecutor.__call__

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()
        return every(self, *args, **options)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            _patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **options)

    GridExecutor.__call__, InterpretedFunction.__call__ = launch, call


def _footprint(config: Any) -> tuple[int, int]:
    return config.num_stages, sum(x for x in config.kwargs.values() if isinstance(x, int))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every registered backend. A test calls `support.require`, which skips it if the backend does
    not claim the call; `test_refusals` tests those calls."""
    return request.param


@pytest.fixture
def dtype(backend: str) -> torch.dtype:
    """The most precise dtype up to float32 that the backend claims."""
    claimed = next(i.capabilities.dtypes for i in gdn.list_backends() if i.name == backend)
    return next(d for d in (torch.float32, torch.bfloat16, torch.float16) if d in claimed)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Undo registrations and defaults."""
    before, default = dict(registry._backends), dispatch._default
    yield
    registry._backends.clear()
    registry._backends.update(before)
    registry.generation += 1
    dispatch._default = default


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that GDN_KERNELS names, with one entry of `prebuilt_entries`; the cache is empty."""
    from gdn.backends.tilelang import launch, prebuilt
    from prebuilt_entries import write

    monkeypatch.setenv("GDN_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(prebuilt, "unloadable", {})
    prebuilt._warn_once.cache_clear()
    write(tmp_path / "kernels")
    return tmp_path / "kernels"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from gdn.backends.tilelang import toolkit

    monkeypatch.setattr(toolkit, "find_nvcc", lambda: None)
