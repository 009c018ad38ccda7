"""The command line: output, files and exit status."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gdn.backends.torch import TorchBackend, TorchPlan

import gdn
from gdn import cli
from gdn.backend import Forward
from gdn.compare import comparison
from gdn.compare.options import make_case
from gdn.problem import Call, PoolCall

HEADS = "H=1,HV=2,K=16,V=16"
SMALL = ["--shape", f"T=70,{HEADS}", "--device", "cpu"]


class Wrong(TorchBackend):
    """Its o is one percent too large."""

    name = "wrong"

    def plan(self, call: Call | PoolCall) -> TorchPlan:
        return WrongPlan(None)


class WrongPlan(TorchPlan):
    def forward(self, call: Call, save: bool) -> Forward:
        right = super().forward(call, save)
        return right._replace(o=1.01 * right.o)


class Broken(TorchBackend):
    """Its forward raises."""

    name = "broken"

    def plan(self, call: Call | PoolCall) -> TorchPlan:
        return BrokenPlan(None)


class BrokenPlan(TorchPlan):
    def forward(self, call: Call, save: bool) -> Forward:
        raise ZeroDivisionError("no luck")


def test_info_names_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    for info in gdn.list_backends():
        assert info.name in out
    assert cli.main(["info", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| backend | dtypes |")


def test_explain_gives_reasons_and_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    hopper = ["explain", "--device", "cuda", "--sm", "90", "--no-gradients"]
    assert cli.main([*hopper, "--shape", "T=1000000,K=300"]) == 0
    out = capsys.readouterr().out
    assert "T=1000000 H=16 HV=32 K=300" in out
    assert "cuda sm_90" in out
    assert "K must be at most 256, got 300" in out
    assert "chosen   torch" in out
    assert cli.main(["explain", *SMALL, "--backend", "fla"]) == 1
    assert "must be on cuda, got cpu" in capsys.readouterr().out
    assert cli.main([*hopper, "--decode"]) == 0
    has_fla = importlib.util.find_spec("fla") is not None
    assert ("states gathered and scattered" in capsys.readouterr().out) == has_fla
    assert cli.main(["explain", "--lengths", "3,4", "--device", "cpu"]) == 0
    assert "T=7" in capsys.readouterr().out
    assert cli.main([*hopper, "--gates", "channel", "--lower-bound", "-4"]) == 0
    out = capsys.readouterr().out
    assert "H=32 HV=32 K=128" in out
    assert "per_channel gate_lower_bound=-4" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "--shape", "T=x"], "must be like T=8192"),
        (["explain", "--shape", "D=3"], "must be like T=8192"),
        (["explain", "--shape", "HV=5"], "HV must be a multiple of H"),
        (["explain", "--lengths", "3;4"], "must be like 100,2000"),
        (["explain", "--gates", "key"], "invalid choice: 'key'"),
        (["explain", "--lower-bound", "0"], "must be a number below 0, such as -5, got '0'"),
        (["explain", "--lower-bound", "-5", "--no-raw"], "--lower-bound must come with --raw"),
        (["explain", "--backend", "troch"], "did you mean 'torch'"),
        (["explain", "--device", "gpu"], "must be like cuda:1"),
        (["compare", "--backends", "troch"], "did you mean 'torch'"),
        (["compare", "--lengths", "0,0"], "leave a token"),
        (["compare", "--shape", "H=0,HV=0,T=3"], "HV must be a multiple of H"),
        (["compare", "--shape", "K=0,T=3"], "HV must be a multiple of H"),
        (["compare", "--device", "cuda:99"], "got cuda:99; it sees "),
        (["compare", "--device", "cpu:3"], "--device must be cpu or an NVIDIA GPU"),
        (["compare", "--device", "mps"], "--device must be cpu or an NVIDIA GPU"),
        (["compare", "--device", "meta"], "--device must be cpu or an NVIDIA GPU"),
        (["compare", "--json", "nowhere/out.json"], "--json must name a file that can be written"),
        (["compare", "--plot", "nowhere/out.png"], "nowhere; make it first"),
        (["compare", "--json", "."], "which is a folder"),
        (["compare", "--json", "/proc/out.json"], "out.json, which you may not write"),
        (["compare", "--plot", "out.txt"], "--plot must end in a picture's format"),
        (["compare", "--plot", "out"], "got out; add .png"),
        (["compare", "--device", "cpu", "--shape", "T=100000000"], "fit in the memory of cpu"),
        (["compare", "--lengths", "2147483648"], "less than 2^31"),
        ([], "COMMAND"),
    ],
)
def test_bad_options_end_with_2_and_a_reason(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    if "/proc/out.json" in arguments:  # as anyone but root sees it
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(comparison, "compare", lambda *_: pytest.fail("it measures"))
    assert status_of(arguments) == 2
    assert words in capsys.readouterr().err


def status_of(arguments: list[str]) -> object:
    try:
        return cli.main(arguments)
    except SystemExit as exit_:  # argparse's own
        return exit_.code


@pytest.mark.parametrize("command", ["explain", "warmup", "compare"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lengths", "3,4", "--shape", "T=9"], "which give B=1 and their sum as T=7, got T=9;"),
        (["--lengths", "3,4", "--shape", "H=16,B=2"], "which give B=1 and their sum as T=7, got B"),
        (["--shape", "T=1000000000000000"], "(1, 1000000000000000, 16, 128)"),
        (["--shape", f"T={10**30}"], "q below 2^63 bytes"),
        (["--shape", f"T=3,V={10**17}"], "v below 2^63 bytes"),
        (["--shape", f"T=0,K={10**9},V={10**9}"], "the state below 2^63 bytes"),
        (["--lengths", f"{10**30}"], "q below 2^63 bytes"),
        (["--shape", "T=²"], "must be like T=8192"),
    ],
)
def test_calls_that_cannot_be_are_refused_by_every_command(
    command: str, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of([command, *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["explain", "compare"])
def test_a_gpu_that_is_not_there_is_refused_beside_others(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.main([command, "--device", "cuda:7"]) == 2
    assert "got cuda:7; it sees cuda:0, cuda:1 here" in capsys.readouterr().err


def test_explain_allocates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--device", "cpu", "--shape", f"H={10**11},HV={10**11}"]) == 0
    assert "HV=100000000000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at x] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        OverflowError("int too big to convert"),
    ],
)
def test_what_does_not_fit_in_memory_ends_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "compare", raising(error))
    assert cli.main(["compare", *SMALL]) == 1
    assert capsys.readouterr().err.startswith("gdn: the tensors do not fit in memory; give smaller")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "compare", raising(RuntimeError("fix the torch backend first")))
    with pytest.raises(RuntimeError, match="fix the torch backend"):
        cli.main(["compare", *SMALL])


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*arguments: Any) -> Any:
        raise error

    return function


def test_ctrl_c_ends_in_one_line_and_gives_the_cursor_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("rich")
    control, terminal = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(comparison, "compare", raising(KeyboardInterrupt()))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert cli.main(["compare", *SMALL]) == 130
    shown = ""
    with contextlib.suppress(OSError), os.fdopen(control) as screen:  # EIO at its end
        while text := screen.readline():
            shown += text
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > -1
    assert shown.endswith("gdn: interrupted\n")


def test_compare_checks_times_writes_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    quick = [*SMALL, "--backends", "torch,fla"]  # without Triton's slow interpreter
    assert cli.main(["compare", *quick, "--json", str(file), "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert "fla: not run: " in out
    assert "first calls and agreement of torch" in err
    report = json.loads(file.read_text())
    (row,) = (row for row in report["rows"] if row["backend"] == "torch")
    assert set(row["errors"]) == {
        "o", "final_state", "q", "k", "v", "g", "beta", "A_log", "dt_bias",
    }  # fmt: skip
    assert all(0 < error < 1e-5 for error in row["errors"].values())
    for found in row["passes"].values():
        assert found["roofline"] > 0
        assert found["wall"]["ms"] > 0
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert picture.read_bytes().startswith(b"\x89PNG")
    quick += ["--shape", HEADS, "--lengths", "3,0,70"]
    assert cli.main(["compare", *quick, "--markdown"]) == 0
    assert "| torch | fwd+bwd | torch |" in capsys.readouterr().out


def test_a_call_that_no_backend_can_run_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", "--backend", "tilelang", "--shape", "K=32"]) == 1
    assert "K must be one of 64, 96, 128, 192, 256, got 32" in capsys.readouterr().err
    assert cli.main(["compare", *SMALL, "--backends", "fla"]) == 1
    assert "fla: not run: " in capsys.readouterr().out


def test_warmup_says_where_nothing_is_compiled_ahead(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", "--backend", "torch"]) == 0
    assert capsys.readouterr().out == "torch compiles at its first call, nothing ahead of it\n"


@pytest.mark.usefixtures("clean_registry")
def test_compare_fails_loudly_and_times_only_what_agrees(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for backend in (Wrong(), Broken()):
        gdn.register_backend(backend)
    assert cli.main(["compare", *SMALL, "--backends", "wrong,broken,torch"]) == 1
    out = capsys.readouterr().out
    assert "wrong: FAILED, and was not timed: relative error above 0.0001: o 1.0e-02" in out
    assert "broken: FAILED, and was not timed: ZeroDivisionError: no luck" in out
    case = make_case(cli.make_parser().parse_args(["compare", *SMALL]))
    report = comparison.compare(case, torch.device("cpu"), ["wrong", "torch"])
    timed = {row.backend: bool(row.passes) for row in report.rows}
    assert timed == {"wrong": False, "torch": True}
    assert not report.ok
