"""What `gdn compare` shows and writes of a report: its table on a terminal and in a pipe, and its
JSON; and the ceilings of slow products."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn import cli
from gdn.compare import comparison, console, roofline, tables
from gdn.compare.comparison import Measurement, Report, Row
from gdn.compare.environment import environment
from gdn.compare.roofline import PASSES, Ceilings
from gdn.compare.timing import Timing
from gdn.testing import Case

CPU = torch.device("cpu")
NAN = float("nan")
PATH = "TileLang, L2 norm by torch.compile"


def make_report() -> Report:
    """Two backends, the second of which has gradients that are NaN."""
    rows = []
    for name, path in (("tilelang", "TileLang"), ("flashqla", PATH)):
        row = Row(name, errors={"o": 1.5e-3, "final_state": 1.6e-3, "q": 2.5e-3, "k": 2.4e-3})
        row.paths = dict.fromkeys(PASSES, path)
        row.first_calls = {"fwd": 12.34, "fwd+bwd": 123.45}
        for n, which in enumerate(PASSES):
            wall, gpu = Timing(10.125 + n, 0.1, 9, "wall"), Timing(585.112 + n, 0.2, 9, "events")
            row.passes[which] = Measurement(path, wall, gpu, 193.5, 1512.0, 0.248, 10**9)
        rows.append(row)
    rows[1].errors |= {"k": NAN}
    rows[1].passes["bwd"] = Measurement(PATH, None, None, NAN, NAN, float("inf"), None)
    return Report(Case("x", T=70), environment(CPU), Ceilings(8e14, 4e12), rows)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command on that report, with further options."""
    monkeypatch.setattr(comparison, "compare", lambda *_: make_report())
    return lambda *options: cli.main(["compare", "--device", "cpu", "--shape", "T=70", *options])


def cells(rows: tables.Table) -> set[str]:
    """The numbers of a table, which may not be broken over two lines."""
    return {cell for row in rows for n, cell in enumerate(row) if tables.COMPARISON[n] != "path"}


@pytest.fixture(params=[True, False], ids=["rich", "plain"])
def printer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are printed by rich, or as plain text."""
    if request.param:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(console, "_has_rich", lambda: False)


@pytest.mark.usefixtures("printer")
@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_terminal_gets_the_table_in_parts(
    compare: Any,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert compare() == 0
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    starts = [line.split()[:2] for line in lines if line.split()[:1] == ["backend"]]
    assert starts == [["backend", "pass"]] * len(starts)
    assert len(starts) > 1
    words = " ".join(lines)
    assert all(cell in words for cell in cells(tables.comparison_rows(make_report())))


@pytest.mark.usefixtures("printer")
def test_a_pipe_gets_all_columns_beside_each_other(
    compare: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert compare() == 0
    lines = capsys.readouterr().out.splitlines()
    (header,) = (line for line in lines if line.split()[:1] == ["backend"])
    assert header.split() == " ".join(tables.COMPARISON).split()
    for row in tables.comparison_rows(make_report()):
        assert any(line.split() == " ".join(row).split() for line in lines)


def test_json_has_null_for_what_is_not_a_number(compare: Any, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert compare("--json", str(file)) == 0
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    row = found["rows"][1]
    assert row["errors"]["k"] is None
    assert row["errors"]["q"] == 2.5e-3
    assert row["passes"]["bwd"]["tflops"] is row["passes"]["bwd"]["roofline"] is None
    assert found["case"]["T"] == 70


def test_a_gradient_that_is_nan_is_the_worst() -> None:
    rows = tables.comparison_rows(make_report())
    gradients = [row[tables.COMPARISON.index("gradients")] for row in rows if row[1] == "bwd"]
    assert gradients == ["2.5e-03", "nan"]


def test_a_link_is_checked_where_it_leads(
    compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "nowhere" / "out.json")
    assert compare("--json", str(link)) == 2
    assert "nowhere; make it first" in capsys.readouterr().err


def test_the_ceilings_of_a_slow_product_take_little_time() -> None:
    """A float16 product of 1536 rows takes 6 to 17 seconds on a CPU without a float16 kernel."""
    start = time.perf_counter()
    found = roofline.ceilings.__wrapped__(CPU, torch.float16)
    assert time.perf_counter() - start < 15
    assert 0 < found.flops < 1e14


def test_products_are_as_large_as_the_device_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks by the time of the product between two looks at it."""
    for gflops, rows in ((200, 1536), (40, 1536), (1.2, 384), (0.01, 192)):
        clock, sizes = [0.0], list[int]()

        def randn(n: int, *_: Any, sizes: list[int] = sizes, **kwargs: Any) -> torch.Tensor:
            sizes.append(n)
            return torch.empty(1, 1)

        def now(clock: list[float] = clock, sizes: list[int] = sizes, g: float = gflops) -> float:
            clock[0] += sizes[-1] ** 3 / g / 1e9
            return clock[0]

        monkeypatch.setattr(torch, "randn", randn)
        monkeypatch.setattr(time, "perf_counter", now)
        found = roofline._product_size(CPU, torch.float32)
        monkeypatch.undo()
        assert found == rows
