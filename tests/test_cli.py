"""The command line: output, files and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gdn.backends.torch import TorchBackend, TorchPlan

import gdn
from gdn import cli
from gdn.backend import Forward
from gdn.compare import comparison
from gdn.problem import Call, Step

SMALL = ["--shape", "T=70,H=1,HV=2,K=16,V=16", "--device", "cpu"]


class Wrong(TorchBackend):
    """Its o is one percent too large."""

    name = "wrong"

    def plan(self, call: Call | Step) -> TorchPlan:
        return WrongPlan(None)


class WrongPlan(TorchPlan):
    def forward(self, call: Call, save: bool) -> Forward:
        right = super().forward(call, save)
        return right._replace(o=1.01 * right.o)


class Broken(TorchBackend):
    """Its forward raises."""

    name = "broken"

    def plan(self, call: Call | Step) -> TorchPlan:
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
    assert "states gathered and scattered" in capsys.readouterr().out
    assert cli.main(["explain", "--lengths", "3,4", "--device", "cpu"]) == 0
    assert "T=7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "--shape", "T=x"], "must be like T=8192"),
        (["explain", "--shape", "D=3"], "must be like T=8192"),
        (["explain", "--shape", "HV=5"], "HV must be a multiple of H"),
        (["explain", "--lengths", "3;4"], "must be like 100,2000"),
        (["explain", "--backend", "troch"], "did you mean 'torch'"),
        (["explain", "--device", "gpu"], "must be like cuda:1"),
        (["compare", "--backends", "troch"], "did you mean 'torch'"),
        (["compare", "--lengths", "0,0"], "leave a token"),
        ([], "COMMAND"),
    ],
)
def test_bad_options_end_with_2_and_a_reason(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status: object
    try:
        status = cli.main(arguments)
    except SystemExit as exit_:  # argparse's own
        status = exit_.code
    assert status == 2
    assert words in capsys.readouterr().err


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
    assert cli.main(["compare", *quick, "--markdown", "--lengths", "3,0,70"]) == 0
    assert "| torch | fwd+bwd | torch |" in capsys.readouterr().out


def test_a_call_that_no_backend_can_run_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", "--backend", "tilelang", "--shape", "K=96"]) == 1
    assert "K must be one of 64, 128, got 96" in capsys.readouterr().err
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
    case = cli._make_case(cli.make_parser().parse_args(["compare", *SMALL]))
    report = comparison.compare(case, torch.device("cpu"), ["wrong", "torch"])
    timed = {row.backend: bool(row.passes) for row in report.rows}
    assert timed == {"wrong": False, "torch": True}
    assert not report.ok
