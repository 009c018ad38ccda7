"""Tables and the plot of `gdn compare` and `gdn info`: rows of text, printed by rich or as
Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from gdn.problem import FLAGS
from gdn.registry import BackendInfo
from gdn.testing import Case
from gdn.testing.agreement import CHECKED_TOKENS, OUTPUTS

from .comparison import Report
from .roofline import PASSES
from .timing import Timing

MARKS = {"events": "*", "difference": "†"}
"""Marks after a latency that was not measured by CUDA graph replay."""
COMPARISON = (
    "backend",
    "pass",
    "path",
    "o",
    "state",
    "gradients",
    "first s",
    "GPU ms",
    "wall ms",
    "TFLOPS",
    "GB/s",
    "roofline",
)
CAPABILITIES = (
    "backend",
    "dtypes",
    "devices",
    "K, V",
    "grouped heads",
    "packed",
    "initial state",
    "resets",
    "per channel",
    "lower bound",
    "backward",
    "decode from",
    "prefill on pools",
    "fused options",
    "deterministic",
    "CUDA graph",
    "context parallel",
    "batch-invariant",
    "needs",
)

Table = list[list[str]]


def markdown(headers: Sequence[str], rows: Table) -> str:
    """A GitHub table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def worst(errors: Iterable[float | None]) -> float | None:
    """The largest error, or None without errors. NaN, which JSON holds as null, is the largest."""
    found = [math.nan if x is None else x for x in errors]
    return max(found, key=lambda x: math.inf if math.isnan(x) else x, default=None)


def _milliseconds(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    return f"{timing.ms:.3f}{MARKS.get(timing.clock, '')}"


def comparison_rows(report: Report) -> Table:
    """One row per backend and timed pass, under the headers `COMPARISON`; "-" if there is no
    value."""
    rows = []
    for row in report.rows:
        gradients = [error for name, error in row.errors.items() if name not in OUTPUTS]
        values = [row.errors.get(name) for name in OUTPUTS], [worst(gradients)]
        errors = [["-" if x is None else f"{x:.1e}" for x in found] for found in values]
        for which, found in row.passes.items():
            forward = which == "fwd"
            first = "" if which == "bwd" else which
            rows.append(
                [
                    row.backend,
                    which,
                    found.path,
                    *([*errors[0], "-"] if forward else ["-", "-", *errors[1]]),
                    f"{row.first_calls[first]:.2f}" if first in row.first_calls else "-",
                    _milliseconds(found.gpu),
                    _milliseconds(found.wall),
                    f"{found.tflops:.3g}",
                    f"{found.gbytes:.0f}",
                    f"{100 * found.roofline:.1f} %",
                ]
            )
    return rows


def comparison_notes(report: Report) -> list[str]:
    """One line for each backend that disagreed, raised, or could not run a pass."""
    notes = []
    for row in report.rows:
        for outcome, reasons in (
            ("FAILED, and was not timed", row.failures),
            ("not run", {which: "; ".join(why) for which, why in row.refusals.items()}),
        ):
            for why in dict.fromkeys(reasons.values()):
                passes = [which for which, other in reasons.items() if other == why]
                which = "" if len(passes) == len(PASSES) else f"{', '.join(passes)} "
                notes.append(f"{row.backend}: {which}{outcome}: {why}")
    return notes


def comparison_title(report: Report) -> str:
    """The case, the device and the versions, and the meaning of the columns."""
    case, limits, about = report.case, report.ceilings, report.environment
    length = (
        f"T={case.T}" if case.lengths is None else f"lengths={','.join(map(str, case.lengths))}"
    )
    dtype = str(case.dtype).removeprefix("torch.")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"B={case.B} {length} H={case.H} HV={case.HV} K={case.K} V={case.V} {dtype}, "
        f"{_gates(case)}, on {about['device']}",
        f"{versions}, commit {about['commit'] or 'unknown'}: {about['command']}",
        f"ceilings measured here: {limits.flops / 1e12:.3g} TFLOPS ({dtype} product), "
        f"{limits.bytes / 1e9:.0f} GB/s (copy)",
        "o, state, gradients (the worst): relative errors against the torch backend in float64, "
        f"which agrees with the definition on {CHECKED_TOKENS} tokens; first s: the first call, "
        "compiling and tuning included",
    ]
    clocks = {m.gpu.clock for row in report.rows for m in row.passes.values() if m.gpu}
    if clocks - {"graph"}:
        lines.append(
            "* between CUDA events, launch gaps included; † fwd+bwd minus fwd; "
            "the others by CUDA graph replay"
        )
    return "\n".join(lines)


def _gates(case: Case) -> str:
    words = ["raw" if case.fused else "finished", "gates"]
    words += ["per channel"] if case.per_channel else []
    words += [] if case.gate_lower_bound is None else [f"of at least {case.gate_lower_bound:g}"]
    return " ".join(words)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "no"


def capability_rows(backends: Sequence[BackendInfo]) -> Table:
    """What each backend declares, under the headers `CAPABILITIES`."""
    rows = []
    for info in backends:
        c = info.capabilities
        sizes = ", ".join(map(str, c.head_dims)) or "any"
        limits = [f"{n} ≤ {m}" for n, m in (("K", c.max_k), ("V", c.max_v)) if m is not None]
        chips = f"sm_{c.min_sm}" if c.min_sm else ""
        chips += " or newer" if c.min_sm and c.max_sm != c.min_sm else ""
        fused = "all" if c.flags >= set(FLAGS) else ", ".join(sorted(c.flags)) or "none"
        rows.append(
            [
                f"`{info.name}`",
                _names(c.dtypes),
                " ".join(filter(None, [", ".join(c.devices) or "any", chips])),
                ", ".join([sizes, *limits]),
                *map(_yes, (c.gva, c.varlen, c.initial_state, c.resets)),
                *map(_yes, (c.per_channel, c.gate_lower_bound, c.backward)),
                _names(c.decode) + ("" if c.speculative or not c.decode else "; one slot each"),
                _names(c.prefill) + ("" if c.checkpoints or not c.prefill else "; no checkpoints")
                or "no",
                fused,
                *map(
                    _yes,
                    (c.deterministic, c.cuda_graph, c.context_parallel, c.batch_invariant),
                ),
                ", ".join(c.packages) or "nothing",
            ]
        )
    return rows


def plot(report: Report, path: Path) -> None:
    """Latency and error of every backend that ran, as a PNG (or what the suffix says)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report.rows if row.passes]
    figure, (latency, error) = plt.subplots(1, 2, figsize=(12, 2 + 0.6 * max(1, len(rows))))
    for n, which in enumerate(PASSES):
        shift = 0.25 * (n - 1)
        timed = [
            (y + shift, row.passes[which]) for y, row in enumerate(rows) if which in row.passes
        ]
        latency.plot([found.ms for _, found in timed], [y for y, _ in timed], "o", label=which)
        for y, found in timed:
            text = f"  {found.ms:.3g} ms ({found.roofline:.1%})"
            latency.annotate(text, (found.ms, y), va="center", fontsize=9)
    for n, label in enumerate(("outputs", "gradients")):
        lengths = [
            worst(x for name, x in row.errors.items() if (name in OUTPUTS) == (n == 0)) or 0.0
            for row in rows
        ]
        error.barh([y + 0.3 * (n - 0.5) for y in range(len(rows))], lengths, 0.28, label=label)
    for axes in (latency, error):
        axes.set_yticks(range(len(rows)), [row.backend for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    latency.set_xscale("log")
    latency.margins(x=0.5)
    latency.set_xlabel("ms a call (share of the roofline)")
    error.ticklabel_format(axis="x", scilimits=(0, 0))
    error.set_xlabel("worst relative error against float64")
    figure.suptitle(comparison_title(report).splitlines()[0], fontsize=10, y=1.04)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
