"""Files that `python -m bench.report` reads and writes: malformed results and documents, folders,
and runs that are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from report import __main__ as command_line
from report import columns, page, reading
from report_rows import make_document

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def document() -> dict[str, Any]:
    return make_document()


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def file(document: dict[str, Any], tmp_path: Path) -> Path:
    return write(tmp_path / "run.json", document)


def refusal(arguments: list[Any], capsys: Capture) -> str:
    """The one line with which a command is refused."""
    assert command_line.main([str(x) for x in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench.report: ")
    assert err.count("\n") == 1
    return err


def of_row(**fields: Any) -> Callable[[Any], None]:
    """Change fields of the first row; ... removes one."""

    def change(document: Any) -> None:
        info = document["benchmarks"][0]["extra_info"]
        info |= {name: x for name, x in fields.items() if x is not ...}
        for name in (name for name, x in fields.items() if x is ...):
            del info[name]

    return change


def of_document(**fields: Any) -> Callable[[Any], None]:
    return lambda document: document.update(fields)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("{", "Expecting property name"),
        (b"\xff\xfe", "codec can't decode"),
        ("[" * 100_000, "recursion"),
        ("3", "the document must be an object, got 3"),
        ("[]", "the document must be an object, got []"),
        ("{}", "holds no rows"),
        (of_document(benchmarks=None), "benchmarks must be a list, got null"),
        (of_document(benchmarks=[3]), "benchmarks[0] must be an object, got 3"),
        (of_document(benchmarks=[{}]), "benchmarks[0] must hold extra_info"),
        (of_document(benchmarks=[{"extra_info": {}}]), "benchmarks[0] must hold stats"),
        (of_document(not_timed={}), "not_timed must be a list"),
        (of_document(not_timed=[3]), "not_timed[0] must be an object, got 3"),
        (of_document(not_timed=[{"backend": "x"}]), "not_timed[0] must hold pass"),
        (of_row(kind="prefil"), "kind must be one of prefill, "),
        (of_row(kind=[]), "kind must be text, got []"),
        (of_row(gates=[]), "gates must be text, got []"),
        (of_row(source={}), "source must be text, got {}"),
        (of_row(latency_ms=...), "benchmarks[0].extra_info must hold latency_ms, got none"),
        (of_row(latency_ms="1"), 'latency_ms must be a number, got "1"'),
        (of_row(latency_ms=None), "latency_ms must be a number, got null"),
        (of_row(latency_ms=float("nan")), "latency_ms must be above 0 and finite, got nan"),
        (of_row(latency_ms=0), "latency_ms must be above 0 and finite, got 0"),
        (of_row(latency_ms=10**400), "int too large"),
        (of_row(environment=...), "must hold environment"),
        (of_row(environment=None), "environment must be an object, got null"),
        (of_row(environment={"device": 3}), "environment.device must be text, got 3"),
        (of_row(ceilings={"flops": 1.0, "bytes": 0}), "bytes must be above 0"),
        (of_row(case={"B": 1, "lengths": None, "dtype": "int3"}), "dtype must be one of float16"),
        (of_row(case=...), "must hold case"),
        (of_row(errors={"o": "small"}), "o must be a number or null"),
        (of_row(clocks={"clocks.sm": 3}), "clocks.sm must be text, got 3"),
        (of_row(shape="big"), "shape must be like 16/32:1x8192, got 'big'"),
        (of_row(**{"pass": "forward"}), "pass must be one of fwd, bwd, fwd+bwd, decode"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_malformed_results_are_refused_in_one_line(
    text: Any, words: str, document: dict[str, Any], file: Path, capsys: Capture
) -> None:
    other = file.with_name("other.json")
    if callable(text):
        text(document)
        text = json.dumps(document)
    other.write_bytes(text if isinstance(text, bytes) else text.encode())
    for arguments in ([other], [other, "--against", file], [file, "--against", other]):
        err = refusal(arguments, capsys)
        assert words in err
        assert "other.json" in err
    marked = file.with_name("doc.md")
    marked.write_text(section("other.json", "speed"))
    assert words in refusal(["--document", marked], capsys)


def test_results_that_are_not_there_are_refused_in_one_line(file: Path, capsys: Capture) -> None:
    missing = file.with_name("missing.json")
    assert "missing.json" in refusal([missing], capsys)
    assert "missing.json" in refusal([file, "--against", missing], capsys)
    assert "missing.md" in refusal(["--document", file.with_name("missing.md")], capsys)
    file.with_name("empty").mkdir()
    assert "holds no rows" in refusal([file.with_name("empty")], capsys)
    assert "give the file" in refusal([], capsys)


def test_what_cannot_be_written_is_refused_in_one_line(file: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    assert f"{file} is a file" in refusal([file, "--out", file], capsys)
    assert f"{file} is a file" in refusal([file, "--out", file / "folder"], capsys)
    file.with_name("run").touch()  # the default folder of run.json
    assert "run is a file" in refusal([file], capsys)
    assert "which is a folder" in refusal(["--document", file.parent], capsys)


def section(files: str, name: str) -> str:
    return f"<!-- bench.report: {files} {name} -->\nstale\n<!-- end of bench.report -->\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (section("run.json", "plot nonsense"), "a plot must be one of standing, latency"),
        (section("bare.json", "plot latency"), "there are no rows for the figure 'latency'"),
        (section("run.json", "nonsense"), "there are no rows for the section 'nonsense'"),
        (section("run.json", "speed").rpartition("<")[0], "got 1 and 0, 0 of them in pairs"),
        ("<!-- bench.report: run.json speed -->\n" + section("run.json", "speed"), "got 2 and 1"),
    ],
)
def test_malformed_documents_are_refused_in_one_line_and_stay(
    text: str, words: str, file: Path, document: dict[str, Any], capsys: Capture
) -> None:
    pytest.importorskip("matplotlib")
    document["benchmarks"] = document["benchmarks"][-1:]  # a cold start
    write(file.with_name("bare.json"), document)
    marked = file.with_name("doc.md")
    marked.write_text(text)
    assert words in refusal(["--document", marked], capsys)
    assert marked.read_text() == text


def test_rows_without_an_environment_make_a_page(file: Path, document: dict[str, Any]) -> None:
    """As bench/test_dispatch.py and bench/test_cold_start.py alone write them."""
    pytest.importorskip("matplotlib")
    document["benchmarks"] = document["benchmarks"][-1:]
    write(file, document)
    assert command_line.main([str(file)]) == 0
    assert "<dt>device</dt><dd>unknown</dd>" in (file.parent / "run" / "report.html").read_text()
    marked = file.with_name("doc.md")
    marked.write_text(section("run.json", "cold start"))
    assert command_line.main(["--document", str(marked)]) == 0
    assert "| mine | empty cache | 10.00 |" in marked.read_text()


def test_null_where_a_number_was_nan_is_shown(file: Path, document: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    for row in document["benchmarks"][:-1]:
        row["extra_info"]["errors"]["q"] = None
        row["extra_info"] |= dict.fromkeys(("tflops", "gbytes", "roofline"))
    headers, lines = columns.table(reading.load(write(file, document)).of("prefill"))
    assert lines[0][headers.index("error")] == "1.0e-03"
    assert lines[0][headers.index("gradients' error")] == "nan"
    assert command_line.main([str(file)]) == 0
    marked = file.with_name("doc.md")
    marked.write_text(section("run.json", "speed"))
    assert command_line.main(["--document", str(marked)]) == 0
    shown = marked.read_text()
    assert "| 2/4:1x64 | model | fused | fwd | 0.500† | 1.000* | 0.167 | 3.00x |" in shown
    assert "floor" not in shown


def test_runs_are_compared_row_by_row(
    file: Path, document: dict[str, Any], capsys: Capture
) -> None:
    worse = deepcopy(document)
    worse["benchmarks"][0]["extra_info"]["latency_ms"] *= 1.5
    worse["benchmarks"][1]["extra_info"]["latency_ms"] *= 1.09
    new = write(file.with_name("new.json"), worse)
    assert command_line.main([str(new), "--against", str(file)]) == 1
    out = capsys.readouterr().out
    assert "prefill 2/4:1x64 model fused fwd mine: 0.167 -> 0.250 ms, 50 % slower" in out
    assert "17 rows compared, 1 rows slower by more than 10 %, 0 rows vanished" in out
    assert command_line.main([str(file), "--against", str(file)]) == 0
    assert "17 rows compared, 0 rows slower" in capsys.readouterr().out


def test_rows_that_vanished_are_named_and_fail(
    file: Path, document: dict[str, Any], capsys: Capture
) -> None:
    less = deepcopy(document)
    del less["benchmarks"][2]
    new = write(file.with_name("new.json"), less)
    assert command_line.main([str(new), "--against", str(file)]) == 1
    out = capsys.readouterr().out
    assert "prefill 2/4:1x64 model fused fwd torch: vanished" in out
    assert "16 rows compared, 0 rows slower by more than 10 %, 1 rows vanished" in out
    assert command_line.main([str(file), "--against", str(new)]) == 0  # a new row is no fault


def test_runs_without_a_common_row_are_refused(
    file: Path, document: dict[str, Any], capsys: Capture
) -> None:
    for row in document["benchmarks"]:
        row["extra_info"]["backend"] += "2"
    new = write(file.with_name("new.json"), document)
    assert "must have rows in common" in refusal([new, "--against", file], capsys)


def test_ctrl_c_ends_a_report_in_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib")

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "write", interrupt)
    assert command_line.main([str(file)]) == 130
    assert capsys.readouterr().err == "bench.report: interrupted\n"


def test_the_suite_refuses_a_file_that_cannot_be_written_before_it_measures(
    tmp_path: Path,
) -> None:
    pytest.importorskip("pytest_benchmark")
    target = tmp_path / "nowhere" / "out.json"
    tests = [str(ROOT / "bench" / "test_decode.py"), f"--benchmark-json={target}"]
    options = ["--heads", "1/2", "--batches", "1", "--backends", "torch"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.startswith("ERROR: --benchmark-json must name a file that can be written")
    assert "passed" not in done.stdout


def test_the_suite_writes_null_for_nan() -> None:
    pytest.importorskip("pytest_benchmark")
    code = """
import json, types
import conftest  # the one of bench/
row = {"name": "x", "extra_info": {"errors": {"q": float("nan")}, "tflops": float("inf")}}
document = {"benchmarks": [row | {"stats": {"median": 1.0, "iqr": 0.0, "rounds": 1}}]}
config = types.SimpleNamespace(stash={conftest.NOT_TIMED: []})
conftest.pytest_benchmark_update_json(config, document)
print(json.dumps(document["benchmarks"][0]["extra_info"], allow_nan=False))
"""
    path = {"PYTHONPATH": f"{ROOT / 'bench'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"errors": {"q": None}, "tflops": None}
