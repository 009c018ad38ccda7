"""Calls and warm-ups that lack kernels where none can be compiled: what they say."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from gdn.backends.tilelang import BACKEND, build, launch, prebuilt, toolkit
from gdn.backends.tilelang.decode.plan import DecodePlan
from gdn.backends.tilelang.kernels import Job
from prebuilt_entries import JOB, write

import gdn
from gdn import calls
from gdn.backend import MissingKernelError
from gdn.cli import main
from gdn.problem import Step
from gdn.testing import Case, make_inputs
from gdn.testing.decode import StepCase, make_step

pytest.importorskip("tilelang")
CASE = Case("prebuilt", T=64, K=64, V=64, dtype=torch.bfloat16)


def make_call(step: dict[str, Any]) -> Step:
    step = dict(step)
    made = calls.make(*[step.pop(x) for x in ("q", "k", "v", "g", "beta")], step, False)
    assert isinstance(made, Step)
    return made


def asked(error: str) -> list[Job]:
    """The kernels that a refusal says how to build."""
    command = error.partition("run `gdn ")[2].partition("`")[0]
    words = shlex.split(command)
    assert words[:3] == ["build-kernels", "--out", "DIR"]
    return [build.parse_job(words[n + 1]) for n, x in enumerate(words) if x == "--kernel"]


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_a_call_says_what_it_lacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prebuilt, "load", lambda library: print)
    inputs = make_inputs(CASE, "meta")
    with pytest.raises(gdn.BackendUnsupportedError, match="no nvcc") as refused:
        gdn.warmup(**inputs, backend="tilelang", sm=90)
    jobs = asked(str(refused.value))
    assert [kernel.name for kernel, _ in jobs] == ["prepare", "scan"]
    prebuilt.write_entry(folder, jobs[0][0].name, jobs[0][1], [], b"code")
    with pytest.raises(gdn.BackendUnsupportedError, match="1 of its kernels") as refused:
        gdn.warmup(**inputs, backend="tilelang", sm=90)
    assert asked(str(refused.value)) == jobs[1:]
    with pytest.raises(MissingKernelError, match="1 of its kernels"):
        launch.launchers(jobs[1:])


@pytest.mark.usefixtures("no_compiler")
def test_a_refused_step_and_its_warmup_want_the_same_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up of decode is for any number of states, and so is the command of a refusal."""
    monkeypatch.setattr(prebuilt, "load", lambda library: print)
    case = StepCase("step", B=8, H=2, HV=4, K=64, V=64, dtype=torch.bfloat16)
    step = make_step(case, "meta")
    plan = DecodePlan(make_call(step))

    def refusal() -> list[Job]:
        with pytest.raises(gdn.BackendUnsupportedError, match="no nvcc") as refused:
            gdn.warmup(**step, backend="tilelang", sm=90)
        return asked(str(refused.value))

    jobs = refusal()
    assert {build.write_job(x) for x in jobs} == {build.write_job(x) for x in plan.all_jobs()}
    own = {build.write_job(x) for x in plan.jobs(make_call(step), False)}
    assert len(own) < len(jobs)
    others = [x for x in jobs if build.write_job(x) not in own]
    for kernel, statics in jobs:
        if build.write_job((kernel, statics)) in own:
            prebuilt.write_entry(folder, kernel.name, statics, [], b"code")
    # the step can run now, and its warm-up names the rest
    with pytest.raises(MissingKernelError) as lacking:
        gdn.warmup(**step, backend="tilelang", sm=90)
    assert asked(str(lacking.value)) == others
    for kernel, statics in others:
        prebuilt.write_entry(folder, kernel.name, statics, [], b"code")
    assert gdn.warmup(**step, backend="tilelang", sm=90) == "tilelang"


@pytest.mark.usefixtures("no_compiler")
def test_the_command_warmup_says_what_it_lacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prebuilt, "load", lambda library: print)
    options = ["--decode", "--backend", "tilelang", "--shape", "K=64,V=64", "--sm", "90"]
    assert main(["warmup", *options, "--dtype", "bfloat16"]) == 1
    jobs = asked(capsys.readouterr().err)
    for kernel, statics in jobs[:2]:  # those of the step itself
        prebuilt.write_entry(folder, kernel.name, statics, [], b"code")
    assert main(["warmup", *options, "--dtype", "bfloat16"]) == 1
    assert asked(capsys.readouterr().err) == jobs[2:]


@pytest.mark.usefixtures("no_compiler")
def test_without_kernels_and_compiler_the_backend_is_not_available(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason() -> str | None:
        (row,) = (row for row in gdn.list_backends() if row.name == "tilelang")
        return row.reason

    monkeypatch.setattr(prebuilt, "package_folder", lambda: None)
    assert reason() is None
    monkeypatch.setenv("GDN_KERNELS", "")
    assert reason() == (
        "no nvcc, of CUDA 12 or newer, and no prebuilt kernels (the distribution gdn-kernels-cu13)"
    )


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("other", ["driver", "machine"])
def test_kernels_for_another_machine_are_refused_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """A driver of CUDA 12 and an ARM processor can run none of the kernels of x86 and CUDA 13."""
    inputs = make_inputs(CASE, "meta")
    options = dict(inputs)
    tokens = [options.pop(name) for name in ("q", "k", "v", "g", "beta")]
    for kernel, statics in BACKEND.jobs(calls.make(*tokens, options, False), False):
        prebuilt.write_entry(folder, kernel.name, statics, [], b"code", cuda=13)
    monkeypatch.setattr(prebuilt, "load", lambda library: print)
    monkeypatch.setattr(toolkit, "driver", lambda: 13)
    assert gdn.warmup(**inputs, backend="tilelang", sm=90) == "tilelang"
    monkeypatch.setattr(launch, "_loaded", {})
    if other == "driver":
        monkeypatch.setattr(toolkit, "driver", lambda: 12)
        reason = r"\(prepare\) was built by nvcc of CUDA 13, and the driver is of CUDA 12: update"
    else:
        versions = prebuilt.versions() | {"machine": "aarch64"}
        monkeypatch.setattr(prebuilt, "versions", lambda: versions)
        reason = r"\(prepare\) was built for machine x86_64, not aarch64"
    with (
        pytest.warns(RuntimeWarning, match="was built (by|for)"),  # of each kernel
        pytest.raises(gdn.BackendUnsupportedError, match=reason),
    ):
        gdn.warmup(**inputs, backend="tilelang", sm=90)


@pytest.mark.usefixtures("no_compiler")
def test_a_library_of_another_system_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the right checksum, and the loader refuses it: the next folder is asked."""
    second = folder.parent / "second"
    monkeypatch.setenv("GDN_KERNELS", f"{folder}{os.pathsep}{second}")
    with (
        pytest.warns(RuntimeWarning, match="cannot be loaded"),
        pytest.raises(MissingKernelError, match="1 of its kernels"),
    ):
        launch.launchers([JOB])
    load = prebuilt.load
    good = write(second, b"other code")
    monkeypatch.setattr(prebuilt, "load", lambda x: print if x == good else load(x))
    assert launch.launchers([JOB]) == [print]  # and says so once


@pytest.mark.usefixtures("no_compiler", "folder")
def test_auto_goes_on_where_libraries_do_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(CASE, "meta")
    options = dict(inputs)
    tokens = [options.pop(name) for name in ("q", "k", "v", "g", "beta")]
    call = calls.make(*tokens, options, False)
    for kernel, statics in BACKEND.jobs(call, False):
        prebuilt.write_entry(tmp_path / "kernels", kernel.name, statics, [], b"code")
    assert launch.missing(BACKEND.jobs(call, False)) == []
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        (reason,) = BACKEND.unprepared(call, False)
    assert "2 of its kernels are not prebuilt" in reason
    assert "cannot be loaded" in reason
    assert len(launch.missing(BACKEND.jobs(call, False))) == 2
    for kernel, statics in BACKEND.jobs(call, False):
        assert not build.is_built((kernel, statics), tmp_path / "kernels")
