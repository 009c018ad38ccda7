"""Shared by the figures: colours and markers, panels, a legend, and the order of backends."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from .rows import Row

INK = "#808080"
STYLE: dict[str, tuple[str, str]] = {
    "tilelang": ("#e8590c", "o"),
    "triton": ("#1c7ed6", "s"),
    "fla": ("#2f9e44", "^"),
    "flashqla": ("#ae3ec9", "D"),
    "flashinfer": ("#d9a400", "v"),
    "flashkda": ("#0b7285", "<"),
    "torch": ("#868e96", "P"),
}
WIDE = 9.6
OTHERS = itertools.cycle([("#0ca678", "X"), ("#e64980", "*")])


@functools.cache
def _look(backend: str) -> tuple[str, str]:
    return STYLE.get(backend) or next(OTHERS)


def style_of(backend: str) -> dict[str, Any]:
    """Color and marker of a backend, the same in every figure."""
    color, marker = _look(backend)
    return {"color": color, "marker": marker, "markersize": 5}


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure, in inches, and its axes [rows, columns]."""
    import matplotlib.pyplot as plt

    size = (width, height)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    plt.close(figure)  # pyplot forgets it; we keep it
    return figure, axes


def legend(figure: Any, axes: Any) -> None:
    """One legend above all panels."""
    found: dict[str, Any] = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found, loc="outside upper left", ncols=len(found))


def backends_of(rows: Sequence[Row]) -> list[str]:
    """The backends of some rows, in the order of `STYLE`, others last."""
    present = {row["backend"] for row in rows}
    return [name for name in STYLE if name in present] + sorted(present - set(STYLE))


def heads_of(row: Row) -> str:
    """The H/HV[/K] of a row."""
    return str(row["shape"]).partition(":")[0]


def by_size(row: Row) -> list[int]:
    """The sort key of rows by the numbers of their H/HV[/K]."""
    return [int(n) for n in heads_of(row).split("/")]
