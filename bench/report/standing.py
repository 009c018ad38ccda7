"""The figure of how many times faster or slower ours is than the fastest peer."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from gdn.compare.roofline import PASSES

from .rows import PEERS, Results, Row, by_setting, conditions, device_name, over_peers
from .style import INK, WIDE, panels

FASTER, SLOWER = "#1c7ed6", "#e8590c"
TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 5, 7, 10, 20, 50)
WORDS = {"fwd": "Forward", "bwd": "Backward", "fwd+bwd": "Forward and backward"}


class Group(NamedTuple):
    """Settings of one pass, with the same gates and norm (in words), on one device."""

    which: str
    gates: str
    device: str

    def title(self, peers: set[str], with_device: bool) -> str:
        """The group in words."""
        beside = ", ".join(name for name in PEERS if name in peers)
        which = WORDS.get(self.which, self.which.capitalize())
        device = [self.device] if with_device else []
        return ", ".join([which, self.gates, *device, f"beside {beside}"])


def _group(row: Row) -> Group:
    return Group(row["pass"], conditions(row), device_name(row["environment"]))


def _by_sequences(rows: list[Row]) -> tuple[bool, int, int]:
    """The sort key of settings: one sequence, then batches, then packed ones."""
    case = rows[0]["case"]
    return bool(case["lengths"]), case["B"], rows[0]["tokens"]


def times_faster(results: Results) -> dict[Group, dict[str, list[float]]]:
    """How many times faster the fastest of ours is than the fastest peer, by group and sequences: a
    number for each pair of head counts."""
    settings = by_setting(results.of("prefill") + results.of("decode")).values()
    found: dict[Group, dict[str, list[float]]] = {}
    for rows in sorted(settings, key=_by_sequences):
        ratio, row = over_peers(rows), rows[0]
        if ratio:
            group = _group(row)
            sequences = str(row["shape"]).partition(":")[2]
            found.setdefault(group, {}).setdefault(sequences, []).append(ratio)
    order = (*PASSES, "decode")
    return {group: found[group] for group in sorted(found, key=lambda g: order.index(g.which))}


def _peers(results: Results, group: Group | None = None) -> set[str]:
    """The peers that were timed, in a group or at all."""
    rows = results.of("prefill") + results.of("decode")
    return {
        row["backend"] for row in rows if row["backend"] in PEERS and group in (None, _group(row))
    }


def standing(results: Results) -> Any:
    """Times faster or slower than the fastest peer, a bar for each kind of sequences: the geometric
    mean over the heads, and a line from the least to the most."""
    groups = times_faster(results)
    if not groups:
        return None
    lines = sum(map(len, groups.values())) + len(groups)
    figure, axes = panels(1, 1, WIDE, 0.9 + 0.19 * lines)
    panel, labels, places = axes[0, 0], dict[int, str](), iter(range(lines))
    several = len({group.device for group in groups}) > 1
    for group, bars in groups.items():
        title, above = group.title(_peers(results, group), several), next(places)
        panel.annotate(
            title, (1, above), (4, 0), textcoords="offset points", va="center", weight="bold"
        )
        for (sequences, ratios), y in zip(bars.items(), places, strict=False):  # bars end first
            labels[y] = sequences
            mean, least, most = statistics.geometric_mean(ratios), min(ratios), max(ratios)
            panel.barh(y, mean - 1, 0.7, left=1, color=FASTER if mean >= 1 else SLOWER)
            panel.plot([least, most], [y, y], color=INK, linewidth=1.5)
            if least < 1:
                panel.plot([least, min(most, 1)], [y, y], color=SLOWER, linewidth=3)
            panel.annotate(f" {mean:.2f}", (max(most, 1), y), va="center")
    panel.axvline(1, color=INK)
    panel.set_yticks(list(labels), labels.values())
    panel.set_ylim(lines - 0.5, -0.5)
    panel.grid(False, axis="y")
    every = [1, *(x for bars in groups.values() for ratios in bars.values() for x in ratios)]
    first, last = 0.85 * min(every), 1.2 * max(every)
    ticks = [x for x in TICKS if first <= x <= last]
    panel.set_xscale("log")
    panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
    panel.minorticks_off()
    panel.set_xlim(first, last)
    missing = [name for name in PEERS if name not in _peers(results)]
    absent = f"; not in these runs: {', '.join(missing)}" if missing else ""
    panel.set_xlabel(f"times faster than the fastest peer; left of 1: slower{absent}")
    return figure
