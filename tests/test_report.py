"""Results of the benchmarks: rows, speed-ups, the regression gate, the page, documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from report import __main__ as command_line
from report import columns, reading, standing
from report import document as documents
from report import page as report
from report import rows as results
from report_rows import ABOUT, make_document, prefill

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def document() -> dict[str, Any]:
    return make_document()


@pytest.fixture
def file(document: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    return path


def test_speed_ups_are_over_fla_and_count_losses(file: Path) -> None:
    found = reading.load(file)
    ratios = results.speed_ups(found.of("prefill"))
    mine = [x for key, x in ratios.items() if key[-1] == "mine"]
    assert sorted(mine) == pytest.approx([0.5, 0.5, 3, 3])
    (said, about_torch) = report.standings(found.of("prefill"))
    assert said.startswith("mine: faster than fla in 2 of 4 rows, slower in 2; 0.50x at worst")
    assert "faster than fla in 0 of 4" in about_torch


def test_a_folder_is_read_as_one_run_without_repeated_rows(
    file: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    later = deepcopy(document["benchmarks"][:1])
    later[0]["extra_info"] |= {"gates": "none"}
    later[0]["extra_info"]["environment"] |= {"commit": "decaf", "command": "pytest bench -q"}
    (runs / "a.json").write_text(json.dumps(document))
    (runs / "b.json").write_text(json.dumps({"benchmarks": later}))
    found = reading.load(runs)
    assert len(found.rows) == len(document["benchmarks"]) + 1
    assert len(found.not_timed) == 2
    assert report.provenance(found)["commit"] == "c0ffee, decaf"
    assert report.provenance(found)["command"] == "pytest bench; pytest bench -q"
    (runs / "c.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="twice"):
        reading.load(runs)


def test_over_peers_compares_our_fastest_with_the_fastest_peer() -> None:
    times = {"tilelang": 2.0, "torch": 9.0, "fla": 3.0, "flashqla": 1.0}
    rows = [{"backend": name, "latency_ms": ms} for name, ms in times.items()]
    assert results.over_peers(rows) == 0.5
    assert results.over_peers(rows[:2]) is None


def test_tables_mark_clocks_and_leave_out_empty_columns(file: Path) -> None:
    headers, lines = columns.table(reading.load(file).of("prefill"))
    assert "conversions ms" not in headers
    times = {line[headers.index("ms")] for line in lines}
    assert {"0.167", "0.500†", "1.000*"} <= times
    assert "1.0e-03" in lines[0]


def test_the_price_of_the_same_bits_is_in_their_row(tmp_path: Path) -> None:
    row = prefill("mine", "fwd", 64, 3.0) | {"kind": "same bits", "any_bits_ms": 2.0}
    document = {"benchmarks": [{"extra_info": row, "stats": {"median": 0.5}}]}
    (tmp_path / "run.json").write_text(json.dumps(document))
    headers, (line,) = columns.table(reading.load(tmp_path / "run.json").of("same bits"))
    assert dict(zip(headers, line, strict=True))["price"] == "1.50x"
    row["any_bits_ms"] = None
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="any_bits_ms must be a number"):
        reading.load(tmp_path / "run.json")


def test_a_row_of_layers_says_how_many_times_faster_they_are(tmp_path: Path) -> None:
    environment = prefill("mine", "fwd", 64, 3.0)["environment"]
    row = {"kind": "layer", "shape": "decode 64x1", "backend": "gdn.nn", "layers": 24}
    row |= {"latency_ms": 3.0, "speed_up": 1.5, "launches": 240, "peak_mb": None}
    row |= {"clock": "wall", "environment": environment}
    document = {"benchmarks": [{"extra_info": row, "stats": {"median": 3e-3}}]}
    (tmp_path / "run.json").write_text(json.dumps(document))
    headers, (line,) = columns.table(reading.load(tmp_path / "run.json").of("layer"))
    found = dict(zip(headers, line, strict=True))
    assert found == {
        "layers": "24", "pass": "decode 64x1", "engine": "gdn.nn", "wall ms": "3.000",
        "launches": "240", "over transformers": "1.50",
    }  # fmt: skip
    del row["speed_up"]
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="speed_up"):
        reading.load(tmp_path / "run.json")


def test_the_page_is_one_file_with_the_rows_not_timed(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert command_line.main([str(file), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http" not in page
    assert "a &lt;GPU&gt;" in page
    assert "other cannot run: no &lt;luck&gt; (bwd 2/4:1x64, model gates)" in page
    assert "other FAILED: off by 1" in page
    assert page.count("data:image/png;base64,") == 7
    pictures = sorted(path.stem for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [
        "cold-start",
        "decode",
        "error",
        "latency",
        "roofline",
        "speed-up",
        "standing",
    ]


END = "<!-- end of bench.report -->"


def section(files: str, name: str) -> str:
    return f"<!-- bench.report: {files} {name} -->\nstale\n{END}\n"


def test_sections_of_a_document_are_rewritten(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = tmp_path / "doc.md"
    later = section("later.json", "speed") + section("run.json,later.json", "standing")
    names = ("speed", "standing", "cold start", "plot latency")
    marked = "".join(section("run.json", name) for name in names)
    document.write_text(f"before\n{marked}{later}after\n")
    assert command_line.main(["--document", str(document)]) == 0
    text = document.read_text()
    assert text.count("stale") == 2
    assert text.endswith(f"{later}after\n")
    assert "| 2/4:1x64 | model | fused | fwd | 0.500† | 1.000* | 0.167 | 0.100 | 3.00x |" in text
    assert "| fwd | model | fused | mine | fla | 2 | 0.50x | 1.22x | 3.00x |" in text
    assert "(a <GPU>, CUDA 13.0, gdn at c0ffee.)" in text
    assert "![Latency against length of one sequence](run-latency.png)" in text
    assert (tmp_path / "run-latency.png").read_bytes().startswith(b"\x89PNG")
    assert documents.rewritten(document) == text
    document.write_text(section("run.json", "nothing"))
    assert command_line.main(["--document", str(document)]) == 2


def test_files_are_named_from_the_root_and_shown_together(
    file: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    """As in README and docs/benchmarks.md. Every device has its own rows."""
    pytest.importorskip("matplotlib")
    for row in document["benchmarks"]:
        row["extra_info"] |= {"gates": "none"}
        if "environment" in row["extra_info"]:
            row["extra_info"]["environment"] = ABOUT["environment"] | {"device": "another"}
    (tmp_path / "other.json").write_text(json.dumps(document))
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    for name in ("run", "other"):
        (tmp_path / f"{name}.json").rename(tmp_path / "results" / f"{name}.json")
    target, files = tmp_path / "docs" / "doc.md", "results/run.json,results/other.json"
    target.write_text(section(files, "standing") + section(files, "plot standing"))
    assert command_line.main(["--document", str(target)]) == 0
    text = target.read_text()
    assert "| a <GPU> | fwd | model | fused | mine | fla | 2 | 0.50x | 1.22x | 3.00x |" in text
    assert "| another | bwd | none | fused | mine | fla | 2 | 0.50x | 1.22x | 3.00x |" in text
    assert "](../results/standing.png)" in text
    assert (tmp_path / "results" / "standing.png").exists()
    assert documents.rewritten(target) == text
    target.write_text(section("results/run.json,results/run.json", "speed"))
    assert command_line.main(["--document", str(target)]) == 2  # every row appears twice


def test_older_results_add_the_peers_that_newer_ones_lack(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """A setting that both files have counts once for each pair, with the times of the first."""
    settings = [row["extra_info"] for row in document["benchmarks"]]
    forward = [row for row in settings if row.get("pass") == "fwd" and row["backend"] != "torch"]
    newer = [prefill("mine", "fwd", 64, 0.1), prefill("flashinfer", "fwd", 64, 0.2)]
    older = [*forward, prefill("flashinfer", "fwd", 64, 9.0)]
    for name, rows in (("newer", newer), ("older", older)):
        found = [{"extra_info": row, "stats": {"median": 0.5}} for row in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmarks": found, "not_timed": []}))
    target = tmp_path / "doc.md"
    target.write_text(section("newer.json,older.json", "standing"))
    text = documents.rewritten(target)
    assert "| fwd | model | fused | mine | flashinfer | 1 | 2.00x | 2.00x | 2.00x |" in text
    assert "| fwd | model | fused | mine | fla | 2 | 0.50x | 1.22x | 3.00x |" in text


def test_standing_is_beside_the_fastest_peer(document: dict[str, Any]) -> None:
    """For each choice of sequences, one number per choice of heads; rows without a peer are left
    out."""
    for row in document["benchmarks"][:6]:
        other = deepcopy(row["extra_info"])
        other |= {"shape": other["shape"].replace("2/4", "4/4"), "latency_ms": 1.0}
        document["benchmarks"].append({"extra_info": other, "stats": {"median": 0.5}})
    flashqla = prefill("flashqla", "fwd", 64, 0.1)
    document["benchmarks"].append({"extra_info": flashqla, "stats": {"median": 0.5}})
    found = results.Results(results.rows_of(document), [])
    groups = standing.times_faster(found)
    assert [group.which for group in groups] == ["fwd", "bwd", "decode"]
    forward, backward, _ = groups.values()
    assert list(forward) == ["1x64", "1x128"]
    assert forward["1x64"] == pytest.approx([0.6, 1.0])
    assert backward["1x64"] == pytest.approx([3.0])
    (group, *_) = groups
    assert group.title({"fla", "mine"}, True) == "Forward, model gates, a <GPU>, beside fla"
    assert group.title({"fla", "mine"}, False) == "Forward, model gates, beside fla"
    assert standing.standing(results.Results(found.rows[:1], [])) is None


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="not in a checkout")
@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_the_numbers_of_documents_are_those_of_the_committed_results(name: str) -> None:
    document, text = ROOT / name, (ROOT / name).read_text()
    found = list(documents.SECTION.finditer(text))
    assert found
    files = [file for match in found for file in match["files"].split(",")]
    assert [file for file in files if not (ROOT / file).exists()] == []
    assert documents.rewritten(document) == text, f"run python -m bench.report --document {name}"
    for picture in documents.pictures(document):
        assert picture.path.exists()


def bench(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *options]
    # pytest-benchmark times nothing below a worker of xdist, which it knows by this variable
    inherited = {key: value for key, value in os.environ.items() if key != "PYTEST_XDIST_WORKER"}
    environment = inherited | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_suite_writes_what_the_report_reads(tmp_path: Path) -> None:
    """A small real run: two shapes, one backend that agrees and one that cannot run."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("matplotlib")
    target = tmp_path / "small.json"
    tests = [str(ROOT / "bench" / f"test_{name}.py") for name in ("prefill", "decode")]
    options = ["--quick", "--shapes", "1/2/16:1x70|40+3", "--backends", "torch,flashqla"]
    options += ["--heads", "1/2", "--batches", "1,3", "--ahead"]
    done = bench(*tests, *options, f"--benchmark-json={target}")
    assert done.returncode == 0, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert "flashqla 1/2/16:1x70: BackendUnsupportedError" in done.stdout  # from --ahead
    found = reading.load(target)
    assert {row["pass"] for row in found.rows} == {"fwd", "bwd", "fwd+bwd", "decode"}
    assert {row["shape"] for row in found.of("prefill")} == {"1/2/16:1x70", "1/2/16:40+3"}
    assert {row["shape"] for row in found.of("decode")} == {"1/2:1x1", "1/2:3x1"}
    assert all(0 < row["errors"]["o"] < 1e-5 for row in found.rows)
    assert all("K must be one of 128" in row["refused"] for row in found.not_timed[:3])
    assert "torch" in report.page(found, [])


def test_a_run_that_is_killed_keeps_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "kill_third.py").write_text(
        "import os\n"
        "calls = []\n"
        "def pytest_pyfunc_call(pyfuncitem):\n"
        "    calls.append(pyfuncitem)\n"
        "    if len(calls) == 3:\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    options = ["--quick", "--shapes", "1/2/16:1x70", "--backends", "torch", "-p", "kill_third"]
    target = tmp_path / "rows.json"
    tests = str(ROOT / "bench" / "test_prefill.py")
    done = bench(tests, *options, f"--benchmark-json={target}", PYTHONPATH=str(tmp_path))
    assert done.returncode == -9
    found = reading.load(tmp_path / "rows.unfinished.json")
    assert [row["pass"] for row in found.rows] == ["fwd", "bwd"]
