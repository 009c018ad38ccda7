"""Results of the benchmarks: rows, speed-ups, the regression gate, the page, README's sections."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from report import __main__ as command_line
from report import page as report
from report import readme
from report import rows as results

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {
    "ceilings": {"flops": 8e14, "bytes": 4e12},
    "clocks": {"clocks.sm": "1980 MHz"},
    "environment": {
        "device": "a <GPU>",
        "cuda": "13.0",
        "python": "3.12",
        "versions": {"torch": "2.11"},
        "commit": "c0ffee",
        "command": "pytest bench",
        "time": "then",
    },
}


def prefill(backend: str, which: str, T: int, ms: float, clock: str = "graph") -> dict[str, Any]:
    case = {"B": 1, "lengths": None, "dtype": "bfloat16"}
    row = {"shape": f"2/4:1x{T}", "gates": "model", "pass": which, "backend": backend}
    rates = {"tflops": 100 / ms, "gbytes": 50 / ms, "roofline": 0.1 / ms, "peak_mb": 3.0}
    errors = {"o": 1e-3, "q": 2e-3}
    more = {"kind": "prefill", "tokens": T, "path": "p", "latency_ms": ms, "clock": clock}
    return row | rates | more | ABOUT | {"case": case, "errors": errors}


def decode(backend: str, batch: int, ms: float) -> dict[str, Any]:
    more = {"kind": "decode", "shape": f"2/4:{batch}x1", "pass": "decode", "batch": batch}
    return prefill(backend, "decode", batch, ms) | more


@pytest.fixture
def document() -> dict[str, Any]:
    """fla twice as fast as torch; mine three times as fast as fla at 64 tokens, half at 128."""
    rows = []
    for which in ("fwd", "bwd"):
        for T in (64, 128):
            mine = T / 128 / 3 if T == 64 else 2 * T / 128
            rows.append(prefill("mine", which, T, mine))
            rows.append(prefill("fla", which, T, T / 128, "difference"))
            rows.append(prefill("torch", which, T, 2 * T / 128, "events"))
    rows += [decode(name, n, 0.1 * n) for name in ("mine", "fla") for n in (1, 8)]
    rows.append({"kind": "cold start", "backend": "mine", "kernels": "empty cache"})
    rows[-1] |= {"latency_ms": 1e4}
    refused = {"shape": "2/4:1x64", "gates": "model", "pass": "bwd", "backend": "other"}
    return {
        "benchmarks": [{"extra_info": row, "stats": {"median": 0.5}} for row in rows],
        "not_timed": [refused | {"refused": "no <luck>"}, refused | {"failed": "off by 1"}],
    }


@pytest.fixture
def file(document: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    return path


def test_speed_ups_are_over_fla_and_count_losses(file: Path) -> None:
    found = results.load(file)
    ratios = results.speed_ups(found.of("prefill"))
    mine = [x for key, x in ratios.items() if key[-1] == "mine"]
    assert sorted(mine) == pytest.approx([0.5, 0.5, 3, 3])
    (said, about_torch) = report.standings(found.of("prefill"))
    assert said.startswith("mine: faster than fla in 2 of 4 rows, slower in 2; 0.50x at worst")
    assert "faster than fla in 0 of 4" in about_torch


def test_a_folder_is_its_runs_together_and_no_row_twice(
    file: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    later = deepcopy(document["benchmarks"][:1])
    later[0]["extra_info"] |= {"gates": "none"}
    later[0]["extra_info"]["environment"] |= {"commit": "decaf", "command": "pytest bench -q"}
    (runs / "a.json").write_text(json.dumps(document))
    (runs / "b.json").write_text(json.dumps({"benchmarks": later}))
    found = results.load(runs)
    assert len(found.rows) == len(document["benchmarks"]) + 1
    assert len(found.not_timed) == 2
    assert report.provenance(found)["commit"] == "c0ffee, decaf"
    assert report.provenance(found)["command"] == "pytest bench; pytest bench -q"
    (runs / "c.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="twice"):
        results.load(runs)


def test_ours_over_peers_is_the_fastest_of_each() -> None:
    times = {"tilelang": 2.0, "torch": 9.0, "fla": 3.0, "flashqla": 1.0}
    rows = [{"backend": name, "latency_ms": ms} for name, ms in times.items()]
    assert results.over_peers(rows) == 0.5
    assert results.over_peers(rows[:2]) is None


def test_tables_mark_clocks_and_leave_out_empty_columns(file: Path) -> None:
    headers, lines = results.table(results.load(file).of("prefill"))
    assert "conversions ms" not in headers
    times = {line[headers.index("ms")] for line in lines}
    assert {"0.167", "0.500†", "1.000*"} <= times
    assert "1.0e-03" in lines[0]


def test_regressions_list_slower_rows_and_fail(
    file: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    worse = deepcopy(document)
    worse["benchmarks"][0]["extra_info"]["latency_ms"] *= 1.5
    worse["benchmarks"][1]["extra_info"]["latency_ms"] *= 1.09
    del worse["benchmarks"][2]
    new = file.with_name("new.json")
    new.write_text(json.dumps(worse))
    assert command_line.main([str(new), "--against", str(file)]) == 1
    out = capsys.readouterr().out
    assert "prefill 2/4:1x64 model fwd mine: 0.167 -> 0.250 ms, 50 % slower" in out
    assert "1 rows slower" in out
    assert command_line.main([str(file), "--against", str(file)]) == 0


def test_the_page_is_one_file_and_shows_what_was_not_timed(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert command_line.main([str(file), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http" not in page
    assert "a &lt;GPU&gt;" in page
    assert "other cannot run: no &lt;luck&gt; (bwd 2/4:1x64, model)" in page
    assert "other FAILED: off by 1" in page
    assert page.count("data:image/png;base64,") == 6
    pictures = sorted(path.stem for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["cold-start", "decode", "error", "latency", "roofline", "speed-up"]


def test_sections_of_a_document_are_rewritten(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = tmp_path / "doc.md"
    end = "<!-- end of gdn report -->"
    later = f"<!-- gdn report: later.json speed -->\nstale\n{end}\n"
    names = ("speed", "standing", "cold start", "plot latency")
    marked = "".join(f"<!-- gdn report: run.json {name} -->\nstale\n{end}\n" for name in names)
    document.write_text(f"before\n{marked}{later}after\n")
    assert command_line.main(["--document", str(document)]) == 0
    text = document.read_text()
    assert text.count("stale") == 1
    assert text.endswith(f"{later}after\n")
    assert "| 2/4:1x64 | model | fwd | 0.500† | 1.000* | 0.167 | 0.100 | 3.00x |" in text
    assert "| fwd | mine | fla | 2 | 0.50x | 1.22x | 3.00x |" in text
    assert "![Latency against length of one sequence](run-latency.png)" in text
    assert (tmp_path / "run-latency.png").read_bytes().startswith(b"\x89PNG")
    assert readme.rewritten(document) == text
    document.write_text(f"<!-- gdn report: run.json nothing -->\n{end}")
    assert command_line.main(["--document", str(document)]) == 2


def test_what_is_no_result_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    assert command_line.main([str(empty)]) == 2
    assert "holds no rows" in capsys.readouterr().err
    assert command_line.main([]) == 2


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="not in a checkout")
def test_the_numbers_of_the_readme_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.rewritten(ROOT / "README.md") == text, "run python -m bench.report --document"
    for picture in readme.pictures(ROOT / "README.md"):
        assert picture.path.exists()


def test_the_suite_writes_what_the_report_reads(tmp_path: Path) -> None:
    """The real thing, small: one shape, one backend that agrees and one that cannot run."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("matplotlib")
    target = tmp_path / "small.json"
    tests = [str(ROOT / "bench" / f"test_{name}.py") for name in ("prefill", "decode")]
    options = ["--quick", "--shapes", "1/2/16:1x70|40+3", "--backends", "torch,flashqla"]
    options += ["--heads", "1/2", "--batches", "1,3", "--ahead"]
    command = [sys.executable, "-m", "pytest", *tests, *options, f"--benchmark-json={target}"]
    done = subprocess.run([*command, "-p", "no:xdist"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "flashqla 1/2/16:1x70: BackendUnsupportedError" in done.stdout  # compiled ahead, or not
    found = results.load(target)
    assert {row["pass"] for row in found.rows} == {"fwd", "bwd", "fwd+bwd", "decode"}
    assert {row["shape"] for row in found.of("prefill")} == {"1/2/16:1x70", "1/2/16:40+3"}
    assert {row["shape"] for row in found.of("decode")} == {"1/2:1x1", "1/2:3x1"}
    assert all(0 < row["errors"]["o"] < 1e-5 for row in found.rows)
    assert all("K must be one of 128" in row["refused"] for row in found.not_timed[:3])
    assert "torch" in report.page(found, [])
