"""Tables and a progress bar for the command line: by rich if it is installed, else as plain
text."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

WIDTH = 132
"""Width of a table when the output is not a terminal."""


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their headers, folded to the terminal's width by rich."""
    if not _has_rich():
        widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
        for line in (headers, ["-" * width for width in widths], *rows):
            print("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip())
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*headers, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    (Console() if sys.stdout.isatty() else Console(width=WIDTH)).print(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that moves a progress bar on stderr, or without a terminal prints lines."""
    if not (sys.stderr.isatty() and _has_rich()):
        start = time.perf_counter()
        yield lambda text: print(f"{time.perf_counter() - start:6.1f} s  {text}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("inputs", total=total)
        yield lambda text: bar.update(task, description=text, advance=1)
