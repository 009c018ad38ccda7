"""`python -m bench.report`: write a page and pictures from the results of `pytest bench`, list the
rows that became slower since an older run, or rewrite the marked sections of a document."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from . import document, page
from . import rows as results


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('plots need matplotlib, which is not installed; pip install "gdn[plot]"')


def run(args: argparse.Namespace) -> int:
    """Do what the options ask for."""
    if args.document is not None:
        _need_matplotlib()
        args.document.write_text(document.rewritten(args.document))
        for picture in document.pictures(args.document):
            picture.write()
        return 0
    if args.results is None:
        raise ValueError("give the file that pytest bench --benchmark-json wrote, or --document")
    found = results.load(args.results)
    if args.against is not None:
        slower = results.regressions(found, results.load(args.against))
        print(*page.regression_lines(slower), sep="\n", end="\n" if slower else "")
        print(f"{len(slower)} rows slower by more than {100 * results.SLOWER:.0f} %")
        return 1 if slower else 0
    _need_matplotlib()
    print(page.write(found, args.out or args.results.with_suffix("")))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all is well, 1 if rows became slower, 2 on bad options."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", metavar="RESULTS.json")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: named after the results"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OLD.json",
        help="list the rows that are slower than in OLD.json; exit with 1 if any",
    )
    parser.add_argument(
        "--document", type=Path, metavar="FILE.md",
        help="rewrite the marked sections from the results that they name",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
