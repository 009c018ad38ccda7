"""README's tables and plots, between markers that name committed results:

    <!-- gdn report: bench/results/h100 speed -->
    <!-- end of gdn report -->

A section names a file, or a folder of several runs. It is "speed" (milliseconds of prefill and
decode, a column a backend), "standing" (ours against peers, all settings together), a kind of row
("prefill", "decode", "cold start", "plain PyTorch", ...), or "plot NAME" (a picture beside the
file).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gdn.compare import tables

from . import plots
from . import rows as results
from .page import provenance
from .rows import Results, by_setting

SECTION = re.compile(
    r"(?P<begin><!-- gdn report: (?P<file>\S+) (?P<name>[^>]+?) -->\n)(?P<text>.*?)"
    r"(?P<end><!-- end of gdn report -->)",
    re.DOTALL,
)
"""A marked section: where its numbers are, what it shows, what it says now."""


class Picture(NamedTuple):
    """Which figure of which results belongs at a path."""

    path: Path
    file: Path
    figure: str

    def write(self) -> None:
        """Draw it."""
        plots.draw(self.figure, results.load(self.file)).savefig(self.path, dpi=150)


def _speed(found: Results) -> tuple[list[str], list[list[str]]]:
    """Milliseconds, a row a setting and a column a backend; last, the floor that the roofline sets,
    and how many times faster than the fastest peer the fastest of ours is."""
    rows = [row for row in found.rows if row["kind"] in ("prefill", "decode")]
    names = plots.backends_of(rows)
    lines = []
    for group in sorted(by_setting(rows).values(), key=lambda group: plots.by_size(group[0])):
        here, some = {row["backend"]: row for row in group}, group[0]
        cells = [results.latency(here[name]) if name in here else "-" for name in names]
        floor, ratio = some["roofline"] * some["latency_ms"], results.over_peers(group)
        cells += [f"{floor:.3f}", f"{ratio:.2f}x" if ratio else "-"]
        lines.append([some["shape"], some["gates"], some["pass"], *cells])
    return ["H/HV:sequences", "gates", "pass", *names, "floor", "ours over peers"], lines


def _standing(found: Results) -> tuple[list[str], list[list[str]]]:
    """How many times faster each of ours is than each peer, a row a pass."""
    headers = ["pass", "backend", "over", "settings", "at worst", "geometric mean", "at best"]
    lines = []
    for key, ratios in results.over_each_peer(found.of("prefill") + found.of("decode")).items():
        some = min(ratios), statistics.geometric_mean(ratios), max(ratios)
        lines.append([*key, str(len(ratios)), *(f"{x:.2f}x" for x in some)])
    return headers, lines


def render(file: str, name: str, found: Results) -> str:
    """What stands in a section. ValueError for a section that the results have no rows for."""
    if name.startswith("plot "):
        figure = name.removeprefix("plot ")
        return f"![{plots.FIGURES[figure].heading}]({_picture(file, figure)})\n"
    if name in TABLES:
        table = TABLES[name](found)
    elif found.of(name):
        table = results.table(found.of(name))
    else:
        raise ValueError(f"{file} has no rows for the section {name!r}")
    facts = provenance(found)
    if name == "standing":  # what it sums up says the rest
        origin = f"({facts['device']}.)"
    else:
        about = "; ".join(facts[x] for x in ("device", "versions", "ceilings"))
        commands = "; ".join(f"`{command}`" for command in found.every("command"))
        origin = f"({commands} at commit {facts['commit']}: {about}.)"
    return f"\n{tables.markdown(*table)}\n\n{origin}\n\n"


TABLES = {"speed": _speed, "standing": _standing}


def _picture(file: str, figure: str) -> str:
    return f"{file.removesuffix('.json')}-{figure}.png"


def rewritten(path: Path) -> str:
    """The document with every section as its results say. Files are named from its folder; a
    section whose file is not there yet stays as it is."""

    def replace(match: re.Match[str]) -> str:
        if not (path.parent / match["file"]).exists():
            return match[0]
        found = results.load(path.parent / match["file"])
        return match["begin"] + render(match["file"], match["name"], found) + match["end"]

    return SECTION.sub(replace, path.read_text())


def pictures(path: Path) -> Iterator[Picture]:
    """The pictures that a document's sections show."""
    for match in SECTION.finditer(path.read_text()):
        file, name = match["file"], match["name"]
        if name.startswith("plot ") and (path.parent / file).exists():
            figure = name.removeprefix("plot ")
            yield Picture(path.parent / _picture(file, figure), path.parent / file, figure)
