"""Tables and pictures of a document, between markers that name committed results:

    <!-- bench.report: bench/results/h100 speed -->
    <!-- end of bench.report -->

A section names a file, a folder of several runs, or several of both with commas between, from the
root of the repository. It is "speed" (milliseconds of prefill and decode, a column a backend),
"standing" (how many times faster than each peer, over all settings; of several files the first
that timed both backends on a setting counts), a kind of row ("prefill", "decode", "same bits",
"cold start", ...), or "plot NAME" (a figure of `plots.FIGURES`, saved beside the first file).
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gdn.compare import tables

from . import columns, plots, reading
from . import rows as results
from .page import provenance
from .rows import Results, by_setting
from .style import backends_of, by_size

Table = tuple[list[str], list[list[str]]]

CONDITIONS = ("shape", "gates", "norm", "decay", "pass")
BEGIN, END = "<!-- bench.report: ", "<!-- end of bench.report -->"
SECTION = re.compile(
    rf"(?P<begin>{re.escape(BEGIN)}(?P<files>\S+) (?P<name>[^>]+?) -->\n)(?P<text>.*?)"
    rf"(?P<end>{re.escape(END)})",
    re.DOTALL,
)
"""A marked section: the files of its numbers, its name, and its present text."""


class Picture(NamedTuple):
    """A figure of some results, and the path of its file."""

    path: Path
    files: list[Path]
    figure: str

    def write(self) -> None:
        """Draw it."""
        drawn = plots.draw(self.figure, results.join(map(reading.load, self.files)))
        if drawn is None:
            names = ", ".join(map(str, self.files))
            raise ValueError(f"there are no rows for the figure {self.figure!r} in {names}")
        drawn.savefig(self.path, dpi=150)


def _speed(found: Results) -> Table:
    """Milliseconds, a row a setting and a column a backend; last, the floor that the roofline sets,
    and how many times faster than the fastest peer the fastest of ours is."""
    rows = [row for row in found.rows if row["kind"] in ("prefill", "decode")]
    names = backends_of(rows)
    lines = []
    for group in sorted(by_setting(rows).values(), key=lambda group: by_size(group[0])):
        here, some = {row["backend"]: row for row in group}, group[0]
        cells = [columns.latency(here[name]) if name in here else "-" for name in names]
        share, ratio = some.get("roofline"), results.over_peers(group)
        cells.append("-" if share is None else f"{share * some['latency_ms']:.3f}")
        cells.append(f"{ratio:.2f}x" if ratio else "-")
        lines.append([*(str(some.get(name, "-")) for name in CONDITIONS), *cells])
    headers = ["H/HV:sequences", *CONDITIONS[1:], *names]
    return columns.without_empty([*headers, "floor", "ours over peers"], lines)


def _standing(runs: Sequence[Results]) -> Table:
    """How many times faster each of ours is than each peer, a row a pass; the device too, where
    there are several. Two backends are compared on a setting once, in the first run that has both:
    a later run of older rows adds what newer ones lack."""
    headers = ["pass", "gates", "norm", "decay", "backend", "over", "settings"]
    headers += ["at worst", "geometric mean", "at best"]
    devices = {run.environment["device"] for run in runs}
    first: dict[tuple[Any, ...], tuple[str, results.Row, results.Row]] = {}
    for run in runs:
        device = results.device_name(run.environment) if len(devices) > 1 else "-"
        for row, peer in results.beside_peers(run.of("prefill") + run.of("decode")):
            pair = device, *results.identity(row), peer["backend"]
            first.setdefault(pair, (device, row, peer))
    found: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for device, row, peer in first.values():
        kind = (str(x or "-") for x in (row["norm"], row.get("decay")))
        key = device, row["pass"], *kind, row["backend"], peer["backend"]
        found.setdefault(key, []).append((row["gates"], peer["latency_ms"] / row["latency_ms"]))
    lines = []
    for (device, which, *rest), pairs in found.items():
        gates, ratios = zip(*pairs, strict=True)
        some = min(ratios), statistics.geometric_mean(ratios), max(ratios)
        cells = [which, ", ".join(dict.fromkeys(gates)), *rest, str(len(ratios))]
        lines.append([device, *cells, *(f"{x:.2f}x" for x in some)])
    return columns.without_empty(["device", *headers], lines)


def _origin(runs: Sequence[Results]) -> str:
    """Every device once, with the commits that ran there."""
    commits: dict[str, list[str]] = {}
    for run in runs:
        commits.setdefault(provenance(run)["device"], []).extend(run.every("commit"))
    said = (f"{device}, gdn at {', '.join(dict.fromkeys(x))}" for device, x in commits.items())
    return f"({'; '.join(said)}.)"


def render(name: str, runs: Sequence[Results], picture: str) -> str:
    """The text of a section; `picture` is the link to its picture. ValueError if the results have
    no rows for it."""
    origin = _origin(runs)
    if name.startswith("plot "):
        figure = name.removeprefix("plot ")
        if figure not in plots.FIGURES:
            known = ", ".join(plots.FIGURES)
            raise ValueError(f"a plot must be one of {known}, got the section {name!r}")
        return f"![{plots.FIGURES[figure].heading}]({picture})\n\n{origin}\n"
    if name == "standing":
        table = _standing(runs)
    else:
        found = results.join(runs)
        if name != "speed" and not found.of(name):
            raise ValueError(f"there are no rows for the section {name!r}")
        table = _speed(found) if name == "speed" else columns.table(found.of(name))
        facts = provenance(found)
        about = "; ".join(facts[x] for x in ("device", "versions", "ceilings") if x in facts)
        commands = "; ".join(f"`{command}`" for command in found.every("command"))
        origin = f"({commands} at commit {facts['commit']}: {about}.)"
    return f"\n{tables.markdown(*table)}\n\n{origin}\n\n"


def root_of(document: Path) -> Path:
    """The root of the repository that a document is in; its own folder, if it is in none."""
    folders = document.resolve().parents
    return next((f for f in folders if (f / "pyproject.toml").exists()), folders[0])


def _sections(document: Path) -> Iterator[tuple[re.Match[str], list[Path], Path]]:
    """Each section whose files exist: the match, its files, and the path of its picture. ValueError
    if a marker has no end: its section would reach into the next one."""
    root, text = root_of(document), document.read_text()
    found = list(SECTION.finditer(text))
    if any(text.count(marker) != len(found) for marker in (BEGIN, END)):
        raise ValueError(
            f"{document} must hold pairs of {BEGIN}FILES NAME --> and {END}, got "
            f"{text.count(BEGIN)} and {text.count(END)}, {len(found)} of them in pairs"
        )
    for match in found:
        files = [root / name for name in match["files"].split(",")]
        if all(file.exists() for file in files):
            figure = match["name"].removeprefix("plot ")
            one = files[0].name.removesuffix(".json") + "-" if len(files) == 1 else ""
            yield match, files, files[0].parent / f"{one}{figure}.png"


def rewritten(document: Path) -> str:
    """The document with every section made from its results. A section whose files do not exist
    stays unchanged."""
    text, parts, end = document.read_text(), [], 0
    for match, files, picture in _sections(document):
        link = Path(os.path.relpath(picture, document.resolve().parent)).as_posix()
        body = render(match["name"], [reading.load(file) for file in files], link)
        parts += [text[end : match.start()], match["begin"], body, match["end"]]
        end = match.end()
    return "".join([*parts, text[end:]])


def pictures(document: Path) -> Iterator[Picture]:
    """The pictures that a document's sections show."""
    for match, files, picture in _sections(document):
        if match["name"].startswith("plot "):
            yield Picture(picture, files, match["name"].removeprefix("plot "))
