"""Where the functions that launch TileLang's kernels come from, and which process compiles."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gdn
from gdn import calls
from gdn.problem import Call
from gdn.testing import Case, make_inputs

pytest.importorskip("tilelang")
from gdn.backends.tilelang import BACKEND, build, compile, kernels, launch, prebuilt, toolkit
from gdn.backends.tilelang.forward.plan import ForwardPass
from gdn.backends.tilelang.kernels import KERNELS, Job
from gdn.backends.tilelang.plan import PrefillPlan

JOBS: list[Job] = [(KERNELS[name], {"n": 1}) for name in ("scan", "prepare", "clear_tail")]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[str]]:
    """What is compiled in this process, and in others; no compiler runs. The cache is empty."""
    found: dict[str, list[str]] = {"here": [], "beside": []}

    def add(where: str, job: Job, folder: Path) -> None:
        found[where].append(job[0].name)
        prebuilt.write_entry(folder, job[0].name, job[1], [], job[0].name.encode())

    def build_beside(jobs: list[Job], folder: Path, workers: int, fresh: bool) -> None:
        assert workers > 0
        assert not fresh
        for job in jobs:
            add("beside", job, folder)

    monkeypatch.setattr(build, "build", build_beside)
    monkeypatch.setattr(compile, "build_here", lambda job, folder: add("here", job, folder))
    monkeypatch.setattr(prebuilt, "load", lambda library: library.read_bytes().decode())
    monkeypatch.setattr(launch, "no_compiler", lambda: None)
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(prebuilt, "unloadable", {})
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TILELANG_DISABLE_CACHE", raising=False)
    monkeypatch.delenv("GDN_KERNELS", raising=False)
    return found


def names() -> Any:
    return launch.launchers([*JOBS, JOBS[0]])


def test_the_slowest_kernel_compiles_here(compiled: dict[str, list[str]]) -> None:
    assert names() == ["scan", "prepare", "clear_tail", "scan"]
    assert compiled == {"here": ["prepare"], "beside": ["scan", "clear_tail"]}
    assert names() == ["scan", "prepare", "clear_tail", "scan"]
    assert sum(map(len, compiled.values())) == 3


def test_the_next_process_finds_them_in_the_cache(
    compiled: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch.describe_sources(JOBS) == "kernels: 3 to compile"
    names()
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(launch, "no_compiler", lambda: "no nvcc")
    assert launch.missing(JOBS) == []
    assert launch.describe_sources(JOBS) == "kernels: 3 in cache"
    assert names() == ["scan", "prepare", "clear_tail", "scan"]
    assert sum(map(len, compiled.values())) == 3


def file_in_its_way(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "cache").touch()
    return {}


@pytest.mark.parametrize(
    "prevent", [lambda path: {"TILELANG_DISABLE_CACHE": "1"}, file_in_its_way], ids=["off", "file"]
)
def test_without_a_cache_they_are_compiled_for_this_process(
    compiled: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prevent: Any
) -> None:
    for name, value in prevent(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert names() == names() == ["scan", "prepare", "clear_tail", "scan"]
    assert sum(map(len, compiled.values())) == 3
    assert not (tmp_path / "cache").is_dir()


def test_a_process_that_ends_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "no_nvcc", lambda: None)
    monkeypatch.setattr(build.sys, "executable", "/bin/true")
    with pytest.raises(build.BuildError, match=r"its process ended\n1 more were not tried"):
        build.build(JOBS[:2], tmp_path, workers=1)
    monkeypatch.setattr(build.sys, "executable", "/bin/false")
    with pytest.raises(build.BuildError) as error:
        build.build(JOBS[:2], tmp_path, workers=2)
    assert str(error.value).count("its process ended") == 2


def test_what_other_processes_do_not_build_is_built_here(
    compiled: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(jobs: list[Job], folder: Path, workers: int, fresh: bool) -> None:
        raise build.BuildError("its process ended")

    monkeypatch.setattr(build, "build", fail)
    assert names() == ["scan", "prepare", "clear_tail", "scan"]
    assert sorted(compiled["here"]) == ["clear_tail", "prepare", "scan"]


def test_a_library_that_cannot_be_loaded_is_compiled_again(
    compiled: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names()
    monkeypatch.setattr(launch, "_loaded", {})
    load, tried = prebuilt.load, []

    def load_later(library: Path) -> Any:
        tried.append(library)
        if len(tried) == 1:
            raise OSError("wrong ELF class")
        return load(library)

    monkeypatch.setattr(prebuilt, "load", load_later)
    with pytest.warns(RuntimeWarning, match="cannot be loaded: wrong ELF class"):
        assert names() == ["scan", "prepare", "clear_tail", "scan"]
    assert sum(map(len, compiled.values())) == 4


def test_nothing_is_compiled_when_another_rank_has_just_done_so(
    compiled: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finishes between the two looks at the folders."""
    looks = [JOBS, []]
    monkeypatch.setattr(launch, "missing", lambda jobs: looks.pop(0))
    launch.compile_all(JOBS, JOBS)
    assert not looks
    assert compiled == {"here": [], "beside": []}


@pytest.mark.parametrize("nvcc", [12, 13])
def test_a_kernel_of_another_cuda_is_compiled_again(
    compiled: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, nvcc: int
) -> None:
    """The driver and nvcc are of CUDA 12 now, or of 13: what the driver loads is not compiled."""
    monkeypatch.setattr(toolkit, "driver", lambda: nvcc)
    monkeypatch.setattr(toolkit, "nvcc_version", lambda: nvcc)
    cache = prebuilt.cache_folder()
    assert cache is not None
    entries = [(JOBS[0], 13), (JOBS[1], 12), (JOBS[2], nvcc)]
    for (kernel, statics), cuda in entries:
        prebuilt.write_entry(cache, kernel.name, statics, [], b"before", cuda)
    assert [build.is_built(job, cache) for job, _ in entries] == [nvcc == 13, nvcc == 12, True]
    monkeypatch.setattr(toolkit, "nvcc_version", lambda: 0)
    assert [build.is_built(job, cache) for job, _ in entries] == [nvcc == 13, True, True]
    monkeypatch.setattr(toolkit, "nvcc_version", lambda: nvcc)
    prebuilt._warn_once.cache_clear()
    if nvcc == 13:
        assert names() == ["before"] * 4
        return
    with pytest.warns(RuntimeWarning, match="built by nvcc of CUDA 13, and the driver is of"):
        assert names() == ["scan", "before", "before", "scan"]
    assert compiled == {"here": ["scan"], "beside": []}


def test_an_nvcc_newer_than_the_driver_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.1, V13.1.2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolkit.nvcc_version() == 13
    for driver in (None, 13, 14):
        monkeypatch.setattr(toolkit, "driver", lambda driver=driver: driver)
        assert kernels.no_compiler() is None
    monkeypatch.setattr(toolkit, "driver", lambda: 12)
    assert "nvcc is of CUDA 13 and the driver of CUDA 12" in str(kernels.no_compiler())
    assert kernels.no_nvcc() is None  # it builds for other machines


def test_prepare_is_one_kernel_for_every_v() -> None:
    """It does not read v."""

    def first_job(V: int) -> Job:
        inputs = make_inputs(Case("one", K=64, V=V, dtype=torch.bfloat16), "meta")
        tokens = [inputs.pop(name) for name in ("q", "k", "v", "g", "beta")]
        return BACKEND.jobs(calls.make(*tokens, inputs, False), True)[0]

    assert first_job(64) == first_job(128)
    assert first_job(64)[0].name == "prepare"


def test_a_first_training_step_compiles_all_of_its_kernels_at_once(
    compiled: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward's kernels are compiled beside forward's, and not again; a call that saves nothing,
    or has its kernels, compiles none of them."""
    case = Case("training", K=64, V=64, dtype=torch.bfloat16)
    inputs = make_inputs(case, "meta")
    tokens = [inputs.pop(name) for name in ("q", "k", "v", "g", "beta")]
    call = calls.make(*tokens, inputs, False)
    assert isinstance(call, Call)
    ran: list[bool] = []
    monkeypatch.setattr(ForwardPass, "forward", lambda self, call, save: ran.append(save))
    PrefillPlan(call).forward(call, save=False)
    assert compiled == {"here": [], "beside": []}
    PrefillPlan(call).forward(call, save=True)
    assert compiled["here"] == ["gradients"]
    assert {"prepare", "scan", "gate_sums", "recompute_states", "reverse_scan"} == set(
        compiled["beside"]
    )
    PrefillPlan(call).forward(call, save=True)
    assert len(compiled["here"]) == 1
    assert ran == [False, True, True]


def test_context_parallelism_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that have other prebuilt kernels would choose otherwise."""
    problem = replace(gdn.explain(**make_inputs(Case("one"), "meta")).problem, K=128, V=128)
    problem = replace(problem, context_parallel=True)
    assert not BACKEND.unsupported(problem)
    monkeypatch.setattr("gdn.backends.tilelang.no_compiler", lambda: "no nvcc")
    assert "context parallelism" in "".join(BACKEND.unsupported(problem))


def test_an_import_beside_another_threads_parsing_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load, tried = importlib.import_module, []

    def fail_once(name: str, package: str | None = None) -> Any:
        tried.append(name)
        if len(tried) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=90, after=73)")
        return load(name, package)

    monkeypatch.setattr(kernels.importlib, "import_module", fail_once)
    assert KERNELS["scan"].compiled.build
    assert tried == [".forward.scan"] * 2
