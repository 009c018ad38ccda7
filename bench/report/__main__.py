"""`python -m bench.report`: write a page and pictures from the results of `pytest bench`, list the
rows that became slower since an older run, or rewrite the marked sections of a document."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gdn.compare import console, files

from . import document, page, reading
from . import rows as results


def run(args: argparse.Namespace) -> int:
    """Do what the options ask for."""
    if args.document is not None:
        files.require_matplotlib("--document")
        files.require_writable("--document", args.document)
        text = document.rewritten(args.document)
        for picture in document.pictures(args.document):
            picture.write()
        args.document.write_text(text)
        return 0
    if args.results is None:
        raise ValueError("give the file that pytest bench --benchmark-json wrote, or --document")
    found = reading.load(args.results)
    if args.against is not None:
        changes = results.changes(found, reading.load(args.against))
        print(*page.change_lines(changes), sep="\n")
        return 1 if changes.slower or changes.vanished else 0
    files.require_matplotlib("the page")
    folder = args.out or args.results.with_suffix("")
    files.require_folder("--out", folder)
    print(page.write(found, folder))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all is well, 1 if rows became slower or vanished, 2 on bad options or files, 130 after
    Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", metavar="RESULTS.json")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: named after the results"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OLD.json",
        help="list the rows that are slower than in OLD.json, and those that vanished; exit with "
        "1 if any",
    )
    parser.add_argument(
        "--document", type=Path, metavar="FILE.md",
        help="rewrite the marked sections from the results that they name",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return console.run_command("bench.report", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
