"""One self-contained page and its pictures from the results of a run, and the rows that became
slower."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import columns, plots
from . import rows as results
from .rows import SLOWER, Changes, Results, Row, baseline, identity, setting, speed_ups

DPI = 150
LATENCY = ("ms", "us", "first forward s")
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 88rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
img { max-width: 100%; } p.note, dd, footer { color: GrayText; } figure { margin: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dd { margin: 0; }
div.table { overflow-x: auto; max-height: 40rem; overflow-y: auto; border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th { position: sticky; top: 0; background: Canvas; border-bottom: 1px solid var(--line); }
td, th { padding: .2rem .6rem; text-align: right; white-space: nowrap; }
td.word, th.word { text-align: left; } tr.first td { border-top: 1px solid var(--line); }
tr.best td { background: var(--soft); }
"""
NOTES = (
    "Every row agreed with float64 before it was timed: at its size with the torch backend's, "
    "which agreed with the definition, and on 200 tokens with the definition itself. On a GPU, ms "
    "is the median of CUDA graph replays with the L2 cache flushed, interleaved between backends "
    "(* plain launches between events, gaps included; † forward and backward less forward); wall "
    "ms is one eager call, device synchronised. On a CPU both are wall time. The roofline's floor "
    "is the least work in a pass over the ceilings measured in the same run."
)


def provenance(found: Results) -> dict[str, str]:
    """The device, versions, commits and commands of the numbers, as text."""
    about, limits = found.environment, found.ceilings
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    driver = f", driver {about['driver_version']}" if "driver_version" in about else ""
    cuda = f", CUDA {about['cuda']}" if about["cuda"] else ""
    seen = {row["clocks"].get("clocks.sm", "") for row in found.rows if "clocks" in row}
    clocks = sorted((c for c in seen if c[:1].isdigit()), key=lambda clock: float(clock.split()[0]))
    facts = {
        "device": f"{about['device']}{driver}{cuda}",
        "versions": f"Python {about['python']}, {versions}",
        "commit": ", ".join(found.every("commit")),
        "command": "; ".join(found.every("command")),
        "time": about["time"],
    }
    if limits:
        product, copy = limits["flops"] / 1e12, limits["bytes"] / 1e9
        facts["ceilings"] = f"{product:.3g} TFLOPS in a product, {copy:.0f} GB/s in a copy"
    return facts | ({"clocks": f"{clocks[0]} to {clocks[-1]}"} if clocks else {})


def standings(rows: Sequence[Row]) -> list[str]:
    """A sentence for each backend: in how many rows it is faster than the baseline, and slower."""
    ratios, base = speed_ups(rows), baseline(rows)
    said = []
    for name in dict.fromkeys(row["backend"] for row in rows if row["backend"] != base):
        found = [
            ratios[identity(r)] for r in rows if r["backend"] == name and identity(r) in ratios
        ]
        if found:
            faster, slower = sum(x > 1 for x in found), sum(x < 1 for x in found)
            said.append(
                f"{name}: faster than {base} in {faster} of {len(found)} rows, slower in {slower}; "
                f"{min(found):.2f}x at worst, {statistics.median(found):.2f}x in the median, "
                f"{max(found):.2f}x at best"
            )
    return said


def _table(rows: Sequence[Row]) -> str:
    """An HTML table. The fastest of each setting is shaded; a line separates settings."""
    headers, lines = columns.table(rows)
    ratios, base = speed_ups(rows), baseline(rows)
    compared = any(row.get("backend") != base for row in rows if identity(row) in ratios)
    if compared:
        at = 1 + next(n for n, header in enumerate(headers) if header in LATENCY)
        headers.insert(at, f"over {base}")
        for row, line in zip(rows, lines, strict=True):
            ratio = ratios.get(identity(row))
            line.insert(at, "-" if ratio is None else f"{ratio:.2f}x")
    words = {h for n, h in enumerate(headers) if not any(line[n][:1].isdigit() for line in lines)}
    words |= {h for h in headers if ":" in h}
    kinds = [' class="word"' if h in words else "" for h in headers]
    out = [f"<th{k}>{html.escape(h)}</th>" for h, k in zip(headers, kinds, strict=True)]
    body, before, settings = [], None, results.by_setting(rows)
    for row, line in zip(rows, lines, strict=True):
        peers = [other["latency_ms"] for other in settings[setting(row)]]
        best = len(peers) > 1 and row["latency_ms"] == min(peers)
        classes = "first " * (setting(row) != before) + "best" * best
        before = setting(row)
        cells = "".join(f"<td{k}>{html.escape(x)}</td>" for x, k in zip(line, kinds, strict=True))
        body.append(f'<tr class="{classes.strip()}">{cells}</tr>')
    return (
        f'<div class="table"><table><thead><tr>{"".join(out)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def pictures(found: Results) -> Iterator[tuple[str, str, bytes]]:
    """Name, heading and PNG of every figure that the run has rows for."""
    for name, figure in plots.FIGURES.items():
        drawn = plots.draw(name, found)
        if drawn is not None:
            buffer = io.BytesIO()
            drawn.savefig(buffer, format="png", dpi=DPI)
            yield name, figure.heading, buffer.getvalue()


def page(found: Results, images: Sequence[tuple[str, str, bytes]]) -> str:
    """The whole report as HTML that loads no other file."""
    facts = "".join(
        f"<dt>{name}</dt><dd>{html.escape(fact)}</dd>" for name, fact in provenance(found).items()
    )
    timed = [row for row in found.rows if row["kind"] in ("prefill", "decode")]
    parts = [f"<h1>gdn: Gated DeltaNet, backend against backend</h1><dl>{facts}</dl>"]
    parts.append(_list(standings(timed)))
    parts.append(f'<p class="note">{html.escape(NOTES)}</p>')
    for _, heading, png in images:
        source = base64.b64encode(png).decode()
        width = int.from_bytes(png[16:20]) * 96 // DPI  # the header's; 96 of a page's make an inch
        image = f'<img alt="{heading}" width="{width}" src="data:image/png;base64,{source}">'
        parts.append(f"<h2>{heading}</h2><figure>{image}</figure>")
    for kind in (kind for kind in columns.COLUMNS if found.of(kind)):
        parts.append(f"<h2>{kind.capitalize()}</h2>{_table(found.of(kind))}")
    if found.not_timed:
        parts.append(f"<h2>Not timed</h2>{_list(not_timed(found))}")
    head = f'<meta charset="utf-8"><title>gdn benchmarks</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def not_timed(found: Results) -> list[str]:
    """A line for each backend and reason, with the passes and shapes that were not timed."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in found.not_timed:
        why = f"FAILED: {row['failed']}" if "failed" in row else f"cannot run: {row['refused']}"
        what = f"{row['pass']} {row['shape']}, {results.conditions(row)}"
        groups.setdefault((row["backend"], why), []).append(what)
    return [f"{name} {why} ({'; '.join(rows)})" for (name, why), rows in groups.items()]


def write(found: Results, folder: Path) -> Path:
    """The page and its pictures, in a folder. Returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    images = list(pictures(found))
    for name, _, png in images:
        (folder / f"{name}.png").write_bytes(png)
    target = folder / "report.html"
    target.write_text(page(found, images))
    return target


def _row_name(row: Row) -> str:
    return " ".join(str(x) for x in identity(row) if x is not None)


def change_lines(found: Changes) -> list[str]:
    """A line for each row that became slower, one for each that vanished, and the counts."""
    slower = [
        f"{_row_name(r.row)}: {r.before_ms:.3f} -> {r.row['latency_ms']:.3f} ms, "
        f"{100 * r.slower:.0f} % slower"
        for r in found.slower
    ]
    vanished = [f"{_row_name(row)}: vanished, not in the new run" for row in found.vanished]
    counts = (
        f"{found.compared} rows compared, {len(slower)} rows slower by more than "
        f"{100 * SLOWER:.0f} %, {len(vanished)} rows vanished"
    )
    return [*slower, *vanished, counts]
