"""What the benchmarks share: rows in extra_info, printed together at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn import measure, tables

HERE = Path(__file__).parent
TIMED = "ms (median)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Peers may warn at import without ending a benchmark."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def record(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """Time `run` by the wall clock, device synchronised, and keep columns for the closing table."""

    def time(run: Callable[[], object], rounds: int, **columns: object) -> None:
        def wait() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.pedantic(wait, rounds=rounds, warmup_rounds=1)
        benchmark.extra_info.update(columns)
        benchmark.extra_info["environment"] = measure.environment(device)

    return time


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One Markdown table a benchmark module: its columns and the median time."""
    session = getattr(config, "_benchmarksession", None)
    modules: dict[str, list[Any]] = {}
    for row in session.benchmarks if session else ():
        modules.setdefault(row.fullname.split("::")[0], []).append(row)
    for module, rows in modules.items():
        columns = [name for name in rows[0].extra_info if name != "environment"]
        lines = [
            [*(str(row.extra_info[name]) for name in columns), f"{1e3 * row.stats.median:.3f}"]
            for row in rows
        ]
        terminalreporter.write_sep("-", module)
        terminalreporter.write_line(tables.markdown([*columns, TIMED], lines))
