"""The figures of a report, drawn by matplotlib on a transparent background, in colours that are
legible on white and on black.

Each function takes the results of a run. It returns a figure, or None if there are no rows for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gdn.compare.roofline import PASSES
from gdn.testing import TOLERANCE

from .rows import Results, baseline, conditions, identity, speed_ups
from .standing import standing
from .style import (
    INK,
    STYLE,
    WIDE,
    backends_of,
    by_size,
    heads_of,
    legend,
    panels,
    style_of,
)

EDGE = 8
"""A speed-up or slow-down beyond this factor is drawn at the edge."""


def latency(results: Results) -> Any:
    """Milliseconds against length of one sequence, a panel for each pass and head counts. The torch
    backend is left out beside kernels, since its times would set the scale."""
    rows = [r for r in results.of("prefill") if r["case"]["B"] == 1 and not r["case"]["lengths"]]
    rows = [r for r in rows if r["backend"] != "torch"] or rows
    lengths: dict[tuple[str, str], set[int]] = {}
    for row in sorted(rows, key=by_size):
        lengths.setdefault((heads_of(row), conditions(row)), set()).add(row["tokens"])
    kinds = [kind for kind, found in lengths.items() if len(found) > 1]
    passes = [which for which in PASSES if any(row["pass"] == which for row in rows)]
    if not kinds:
        return None
    from matplotlib.ticker import LogLocator

    figure, axes = panels(
        len(kinds), len(passes), max(WIDE, 3.6 * len(passes)), 2.6 * len(kinds) + 0.5
    )
    for (heads, gates), line in zip(kinds, axes, strict=True):
        for which, panel in zip(passes, line, strict=True):
            chosen = [
                r for r in rows if (heads_of(r), conditions(r), r["pass"]) == (heads, gates, which)
            ]
            for backend in backends_of(chosen):
                points = sorted(
                    (r["tokens"], r["latency_ms"]) for r in chosen if r["backend"] == backend
                )
                panel.plot(*zip(*points, strict=True), label=backend, **style_of(backend))
            panel.set_title(f"{which}, H/HV {heads}, {gates}", fontsize=9)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            ticks = sorted(lengths[heads, gates])
            panel.set_xticks(ticks, [str(n) for n in ticks])
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            panel.yaxis.set_minor_formatter("{x:g}")
            panel.set_xlabel("tokens")
            panel.set_ylabel("ms")
    legend(figure, axes)
    return figure


def speed_up(results: Results) -> Any:
    """How many times faster than the baseline, a line a setting; left of 1 is slower, at the edge
    by `EDGE` or more."""
    rows = [row for row in results.rows if row["kind"] in ("prefill", "decode")]
    ratios, base = speed_ups(rows), baseline(rows)
    others = [r for r in rows if r["backend"] != base and identity(r) in ratios]
    if not others:
        return None
    passes = [p for p in (*PASSES, "decode") if any(row["pass"] == p for row in others)]
    settings: dict[str, list[str]] = {p: [] for p in passes}
    for row in others:
        label = f"{row['shape']}, {conditions(row)}"
        if label not in settings[row["pass"]]:
            settings[row["pass"]].append(label)
    most = max(len(labels) for labels in settings.values())
    figure, axes = panels(1, len(passes), max(WIDE, 3.6 * len(passes)), min(60, 1.4 + 0.24 * most))
    for which, panel in zip(passes, axes[0], strict=True):
        labels = settings[which]
        panel.axvline(1, color=STYLE.get(str(base), ("black",))[0], label=str(base))
        chosen = [row for row in others if row["pass"] == which]
        for backend in backends_of(chosen):
            found = [row for row in chosen if row["backend"] == backend]
            y = [labels.index(f"{row['shape']}, {conditions(row)}") for row in found]
            x = [min(EDGE, max(1 / EDGE, ratios[identity(row)])) for row in found]
            panel.plot(x, y, linestyle="none", label=backend, **style_of(backend))
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        panel.set_xscale("log", base=2)
        ticks = {1 / EDGE: f"≤1/{EDGE}", 0.5: "1/2", 1: "1", 2: "2", 4: "4", EDGE: f"≥{EDGE}"}
        panel.set_xticks(list(ticks), ticks.values())
        panel.set_xlim(0.9 / EDGE, EDGE / 0.9)
        panel.set_title(f"{which}: times faster than {base}", fontsize=9)
    legend(figure, axes)
    return figure


def roofline(results: Results) -> Any:
    """Work a second against work a byte, under what the device was measured to do."""
    rows = [row for row in results.rows if row.get("tflops") and row.get("gbytes")]
    if not rows:
        return None
    product, copy = results.ceilings["flops"] / 1e12, results.ceilings["bytes"] / 1e12
    figure, axes = panels(1, 1, WIDE, 4.8)
    panel = axes[0, 0]
    intensity = [1e3 * row["tflops"] / row["gbytes"] for row in rows]
    ends = [min(intensity) / 2, product / copy, 2 * max([*intensity, product / copy])]
    panel.plot(ends, [min(product, copy * x) for x in ends], color=INK, label="measured ceiling")
    for backend in backends_of(rows):
        chosen = [row for row in rows if row["backend"] == backend]
        x = [1e3 * row["tflops"] / row["gbytes"] for row in chosen]
        y = [row["tflops"] for row in chosen]
        panel.plot(x, y, linestyle="none", label=backend, alpha=0.8, **style_of(backend))
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("operations a byte, at the least (left: decode)")
    panel.set_ylabel("TFLOPS")
    legend(figure, axes)
    return figure


def error(results: Results) -> Any:
    """Relative error against float64 by tensor: the median over all rows, and their range."""
    rows = [row for row in results.rows if row.get("errors")]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row["errors"]))
    backends = backends_of(rows)
    figure, axes = panels(1, 1, WIDE, 4.0)
    panel = axes[0, 0]
    for n, backend in enumerate(backends):
        for x, name in enumerate(names):
            found = sorted(
                row["errors"][name]
                for row in rows
                if row["backend"] == backend and row["errors"].get(name)
            )
            if found:
                at = x + 0.7 * ((n + 0.5) / len(backends) - 0.5)
                style = style_of(backend)
                panel.plot([at, at], [found[0], found[-1]], color=style["color"], linewidth=1)
                label = backend if x == 0 else None
                panel.plot([at], [found[len(found) // 2]], label=label, linestyle="none", **style)
    limit = TOLERANCE[getattr(torch, rows[0]["case"]["dtype"])]
    panel.axhline(limit, color=INK, linestyle="--", label="tolerance")
    panel.set_yscale("log")
    panel.set_xticks(range(len(names)), names, rotation=20)
    panel.set_ylabel("relative error")
    legend(figure, axes)
    return figure


def decode(results: Results) -> Any:
    """Bandwidth of a decode step against the number of requests."""
    rows = [row for row in results.of("decode") if row.get("gbytes")]
    heads = list(dict.fromkeys(map(heads_of, rows)))
    if not rows:
        return None
    figure, axes = panels(1, len(heads), max(WIDE, 3.6 * len(heads)), 3.6)
    for head, panel in zip(heads, axes[0], strict=True):
        chosen = [row for row in rows if heads_of(row) == head]
        for backend in backends_of(chosen):
            points = [(r["batch"], r["gbytes"]) for r in chosen if r["backend"] == backend]
            panel.plot(*zip(*points, strict=True), label=backend, **style_of(backend))
        limit = results.ceilings["bytes"] / 1e9
        panel.axhline(limit, color=INK, linestyle="--", label="measured copy")
        ticks = sorted({row["batch"] for row in chosen})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.set_ylim(0)
        panel.set_xlabel("requests")
        panel.set_ylabel("GB/s")
        panel.set_title(f"H/HV {head}", fontsize=9)
    legend(figure, axes)
    return figure


def cold_start(results: Results) -> Any:
    """Seconds of the first forward in a new process, by what kernels are on disk."""
    rows = results.of("cold start")
    if not rows:
        return None
    backends = backends_of(rows)
    kinds = list(dict.fromkeys(row["kernels"] for row in rows))
    figure, axes = panels(1, 1, WIDE, 1.0 + 0.55 * len(backends))
    panel = axes[0, 0]
    for n, kernels in enumerate(kinds):
        for row in (row for row in rows if row["kernels"] == kernels):
            y = backends.index(row["backend"]) + 0.8 * ((n + 0.5) / len(kinds) - 0.5)
            seconds, color = row["latency_ms"] / 1e3, style_of(row["backend"])["color"]
            panel.barh(y, seconds, 0.76 / len(kinds), color=color, alpha=1 if n == 0 else 0.5)
            panel.annotate(f" {seconds:.2f} s, {kernels}", (seconds, y), va="center")
    panel.set_yticks(range(len(backends)), backends)
    panel.set_ylim(len(backends) - 0.5, -0.5)
    panel.margins(x=0.25)
    panel.set_xlabel("seconds")
    return figure


class Figure(NamedTuple):
    """A figure's heading, and how it is drawn."""

    heading: str
    draw: Callable[[Results], Any]


FIGURES = {
    "standing": Figure("Times faster or slower than the fastest peer", standing),
    "latency": Figure("Latency against length of one sequence", latency),
    "speed-up": Figure("Speed-up", speed_up),
    "roofline": Figure("Roofline", roofline),
    "error": Figure("Error against float64", error),
    "decode": Figure("Decode bandwidth against requests", decode),
    "cold-start": Figure("First call of a new process", cold_start),
}
"""Every figure by the name of its file."""


def draw(name: str, results: Results) -> Any:
    """One of `FIGURES`, or None where the run has no rows for it."""
    import matplotlib

    matplotlib.use("agg")
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    faces = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    style: dict[str, Any] = dict.fromkeys(inks, INK) | dict.fromkeys(faces, "none")
    style |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.grid": True, "grid.color": INK, "grid.alpha": 0.25, "legend.frameon": False}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        return FIGURES[name].draw(results)
