"""Which TileLang kernels the tests on a GPU need, found without one:

    PYTHONPATH=tests pytest -p kernel_list -m gpu -k tilelang tests --kernels list.txt
    gdn build-kernels --kernels-in list.txt --out DIR

With GDN_KERNELS=DIR the tests on a GPU then compile few kernels. Tests run on CPU tensors that pass
for tensors of a GPU. Kernels do nothing, and comparisons pass, so that a test goes on to its next
call. What fails in this world all the same has named the kernels of the calls before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton  # noqa: F401, which asks for a GPU's driver if it is imported later
from gdn.backends.tilelang import launch
from gdn.backends.tilelang.build import write_job
from gdn.backends.tilelang.kernels import Job
from torch.overrides import TorchFunctionMode

import gdn.testing.check
from gdn.problem import Problem

found: dict[str, None] = {}


class CpuForCuda(TorchFunctionMode):
    """PyTorch makes CPU tensors where a CUDA device is named."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        named = {name: _on_cpu(x) for name, x in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **named)


def _on_cpu(x: Any) -> Any:
    if not isinstance(x, (str, torch.device)) or not str(x).startswith("cuda"):
        return x
    return torch.device("cpu")


class Anything:
    """Has every attribute and item, can be called, and equals whatever it is compared with."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: object) -> Anything:
        return self

    def __call__(self, *args: object, **options: object) -> Anything:
        return self

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def note(jobs: Sequence[Job]) -> list[Callable[..., None]]:
    """Note the kernels of jobs, and return functions that do nothing."""
    found.update(dict.fromkeys(map(write_job, jobs)))
    return [lambda *args: None for _ in jobs]


def pretend() -> None:
    """Set up that world, before test modules are imported."""
    make_problem = Problem.__init__

    def on_hopper(self: Problem, *args: Any, **fields: Any) -> None:
        make_problem(self, *args, **fields)
        object.__setattr__(self, "device", "cuda")
        object.__setattr__(self, "sm", 90)

    Problem.__init__ = on_hopper  # type: ignore[method-assign]
    launch.launchers, launch.compile_all = note, lambda needed, every: note(every)  # type: ignore[assignment]
    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count = lambda: True, lambda: 1
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.synchronize = cuda.empty_cache = lambda *args: None
    cuda.Stream = cuda.Event = cuda.current_stream = Anything()
    cuda.stream = lambda stream: contextlib.nullcontext()
    anywhere: Any = torch
    anywhere.Tensor.record_stream = anywhere.testing.assert_close = Anything()
    anywhere.equal = lambda *args: True
    for module in (gdn.testing, gdn.testing.check):
        passing: Any = module
        passing.assert_close = passing.truth = Anything()
        passing.relative_error = lambda *args: 0.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", type=Path, required=True, help="where the list goes")


def pytest_configure() -> None:
    pretend()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    with CpuForCuda():
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of xdist found."""
    found.update(dict.fromkeys(getattr(node, "workeroutput", {}).get("kernels", ())))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config: Any = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["kernels"] = sorted(found)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workeroutput"):
        config.getoption("--kernels").write_text("".join(f"{x}\n" for x in sorted(found)))
