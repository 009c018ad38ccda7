"""What a command shows: tables and a progress bar, by rich if it is installed, else as plain text;
and a refusal or an interruption as one line."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

import gdn
from gdn.backend import MissingKernelError

WIDTH = 132
"""The width to which cells are folded when the output is not a terminal."""
GAP = 3
"""Characters between two columns of a table."""
NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "size calculation overflowed")
"""Words of the RuntimeErrors by which PyTorch says that tensors are too large."""


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def _terminal_width() -> int | None:
    """The terminal's columns; None if the output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_lines(lines: Sequence[str]) -> None:
    """Print lines, on a terminal folded between words."""
    for line in lines:
        width = _terminal_width()
        print(textwrap.fill(line, width, subsequent_indent="  ") if width else line)


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], keys: int | None = None
) -> None:
    """Print rows under their headers.

    Cells are folded to the terminal's width. With `keys` they are not: on a terminal that is too
    narrow for all columns the table is printed in parts, each of which begins with the first `keys`
    columns. Where the output is not a terminal, all columns stand beside each other.
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    natural = sum(widths) + GAP * len(widths)
    terminal = _terminal_width()
    if keys is None:
        _print([*range(len(headers))], headers, rows, terminal or WIDTH)
        return
    for part in _parts(widths, keys, terminal or natural):
        _print(part, headers, rows, terminal or natural)


def _parts(widths: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """The numbers of the columns of each part: the keys, then as many others as there is width
    for, one at least."""
    first = list(range(keys))
    parts = [first]
    for n in range(keys, len(widths)):
        taken = sum(widths[column] + GAP for column in (*parts[-1], n))
        if taken > width and len(parts[-1]) > keys:
            parts.append(first)
        parts[-1] = [*parts[-1], n]
    return parts


def _print(
    columns: Sequence[int], headers: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> None:
    """Print some columns of a table, folded to a width by rich."""
    lines = [[line[n] for n in columns] for line in (headers, *rows)]
    if not _has_rich():
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in (lines[0], ["-" * n for n in widths], *lines[1:]):
            print("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip())
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*lines[0], box=SIMPLE_HEAD, pad_edge=False)
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=width).print(table)


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


def run_command(name: str, run: Callable[[], int]) -> int:
    """The exit status of a command.

    Without a traceback, since its message is complete, ends what the user can mend: 2 after a
    refused option or file, 1 after a call that no backend can run or that does not fit in memory,
    130 after Ctrl-C.
    """
    try:
        return run()
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (ValueError, OSError) as error:
        message, status = str(error), 2
    except (gdn.BackendUnsupportedError, MissingKernelError) as error:
        message, status = str(error), 1
    except (MemoryError, OverflowError, RuntimeError) as error:
        if not _too_large(error):
            raise
        message, status = "the tensors do not fit in memory; give smaller sizes or lengths", 1
    print(f"{name}: {message}", file=sys.stderr)
    return status


def _too_large(error: Exception) -> bool:
    """Whether an error says that tensors are too large for memory, or for PyTorch."""
    kinds = MemoryError, OverflowError, torch.OutOfMemoryError
    return isinstance(error, kinds) or any(words in str(error) for words in NO_MEMORY)
