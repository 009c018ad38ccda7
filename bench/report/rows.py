"""The rows that `pytest bench --benchmark-json` wrote: tables of them, and comparison with an older
run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from gdn.compare import tables

Row = dict[str, Any]
IDENTITY = (
    "kind", "shape", "gates", "norm", "pass", "source", "kernels", "implementation", "backend",
)  # fmt: skip
"""The fields that identify a row within a run. A row has only those of its kind."""
BASELINE = ("fla", "torch")
"""Speed-ups are over the first of these that is in a run."""
PEERS = ("fla", "flashqla", "flashinfer")
"""Backends that are adapters of other libraries. Every other backend of a run is ours."""
SLOWER = 0.10
"""Share of the latency by which a row may be slower before `changes` lists it."""
UNKNOWN: Row = {
    "device": "unknown", "cuda": None, "python": "unknown", "versions": {}, "commit": None,
    "command": "unknown", "time": "unknown",
}  # fmt: skip
"""The environment of rows that do not hold theirs."""


class Results(NamedTuple):
    """The rows of one run, and what was not timed: refusals and failures, each with its reason."""

    rows: list[Row]
    not_timed: list[Row]

    def of(self, kind: str) -> list[Row]:
        """The rows of one kind."""
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def environment(self) -> Row:
        """Device, versions, commit and command; of several runs, those of the first. `UNKNOWN` if
        no row holds them (rows of dispatch and of cold starts do not)."""
        return next((row["environment"] for row in self.rows if "environment" in row), UNKNOWN)

    def every(self, field: str) -> list[str]:
        """The values of a field of the environment, one for each run, without repeats."""
        found = [row["environment"][field] for row in self.rows if "environment" in row]
        found = found or [self.environment[field]]
        return list(dict.fromkeys(str(value or "unknown") for value in found))

    @property
    def ceilings(self) -> Row:
        """The measured rates of the device."""
        return next((row["ceilings"] for row in self.rows if "ceilings" in row), {})


def rows_of(document: dict[str, Any]) -> list[Row]:
    """The rows of a pytest-benchmark document that have a kind, with their wall time. Rows without
    a norm are of runs that had it fused."""
    return [
        {"norm": "fused"} | row["extra_info"] | {"wall_ms": 1e3 * row["stats"]["median"]}
        for row in document.get("benchmarks", [])
        if "kind" in row["extra_info"]
    ]


def join(runs: Iterable[Results]) -> Results:
    """Several runs as one. ValueError if they hold a row twice."""
    found = list(runs)
    rows = [row for run in found for row in run.rows]
    require_once(rows, "what is shown together")
    return Results(rows, [row for run in found for row in run.not_timed])


def require_once(rows: Iterable[Row], where: str) -> None:
    """ValueError if a row is there twice."""
    seen = set[tuple[Any, ...]]()
    for row in rows:
        if identity(row) in seen:
            raise ValueError(f"{where} holds {identity(row)} twice; keep one of the two runs")
        seen.add(identity(row))


def identity(row: Row) -> tuple[Any, ...]:
    """The fields that say what a row measures, without the results."""
    return tuple(row.get(name) for name in IDENTITY)


def conditions(row: Row) -> str:
    """The kind of gates, and the norm where it is not fused, such as "fast gates, no norm"."""
    words = "no decay" if row["gates"] == "none" else f"{row['gates']} gates"
    return f"{words}, no norm" if row.get("norm") == "no" else words


def device_name(environment: Row) -> str:
    """The device in two words, such as NVIDIA H200."""
    return " ".join(environment["device"].split()[:2])


def setting(row: Row) -> tuple[Any, ...]:
    """The identity without the backend: rows that are compared with each other share it."""
    return identity(row)[:-1]


def by_setting(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows that are compared with each other, by their setting."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(setting(row), []).append(row)
    return found


def baseline(rows: Iterable[Row]) -> str | None:
    """The backend that speed-ups are over in these rows."""
    present = {row.get("backend") for row in rows}
    return next((name for name in BASELINE if name in present), None)


def speed_ups(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    """By identity: how many times faster than the baseline on the same setting."""
    base = baseline(rows)
    times = {setting(row): row["latency_ms"] for row in rows if row.get("backend") == base}
    return {
        identity(row): times[setting(row)] / row["latency_ms"]
        for row in rows
        if setting(row) in times
    }


def over_peers(rows: Iterable[Row]) -> float | None:
    """How many times faster the fastest of ours is than the fastest of `PEERS`, in rows of one
    setting; None where one side is missing."""
    times: dict[bool, float] = {}
    for row in rows:
        peer = row["backend"] in PEERS
        times[peer] = min(row["latency_ms"], times.get(peer, float("inf")))
    return times[True] / times[False] if len(times) == 2 else None


def over_each_peer(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], list[float]]:
    """How many times faster ours is, by pass, norm, backend of ours and peer: a number for each
    setting where both were timed."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for here in by_setting(rows).values():
        for row, peer in itertools.product(here, here):
            if row["backend"] not in PEERS and peer["backend"] in PEERS:
                key = row["pass"], row["norm"], row["backend"], peer["backend"]
                found.setdefault(key, []).append(peer["latency_ms"] / row["latency_ms"])
    return found


class Regression(NamedTuple):
    """A row that became slower: its latency now over that before, less one."""

    row: Row
    before_ms: float
    slower: float


class Changes(NamedTuple):
    """What became of the rows of an older run: how many were timed again, which of them are slower
    now, the worst first, and which are not in the new run."""

    compared: int
    slower: list[Regression]
    vanished: list[Row]


def changes(new: Results, old: Results, limit: float = SLOWER) -> Changes:
    """Compare two runs row by row. A row is slower if its latency grew by more than `limit`.
    ValueError if the runs have no row in common."""
    now, before = ({identity(row): row for row in run.rows} for run in (new, old))
    found = [
        Regression(row, past["latency_ms"], row["latency_ms"] / past["latency_ms"] - 1)
        for key, row in now.items()
        if (past := before.get(key)) is not None
    ]
    if not found:
        raise ValueError(
            f"the runs must have rows in common to be compared, got none among {len(now)} new and "
            f"{len(before)} old ones; choose the same shapes, passes and backends"
        )
    slower = sorted((r for r in found if r.slower > limit), key=lambda r: -r.slower)
    return Changes(len(found), slower, [x for key, x in before.items() if key not in now])


def worst(row: Row, outputs: bool) -> float | None:
    """The largest relative error among the outputs, or among the gradients."""
    names = ("o", "final_state", "state")
    errors = row.get("errors", {}).items()
    return tables.worst(x for name, x in errors if (name in names) == outputs)


def _number(field: str, digits: str, scale: float = 1.0) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.get(field)
        return "-" if value is None else format(scale * value, digits)

    return text


def _rate(field: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.get(field)
        return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    return text


def _word(field: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(field, "-"))


def latency(row: Row) -> str:
    """Milliseconds, with a mark unless they are from graph replay."""
    return f"{row['latency_ms']:.3f}{tables.MARKS.get(row['clock'], '')}"


def _error(outputs: bool) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = worst(row, outputs)
        return "-" if value is None else f"{value:.1e}"

    return text


_RATES: dict[str, Callable[[Row], str]] = {
    "ms": latency,
    "wall ms": _number("wall_ms", ".3f"),
    "TFLOPS": _rate("tflops"),
    "GB/s": _rate("gbytes"),
    "roofline": _number("roofline", ".1%"),
    "peak MB": _number("peak_mb", ".0f"),
}
COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "prefill": {
        "H/HV:sequences": _word("shape"),
        "gates": _word("gates"),
        "norm": _word("norm"),
        "pass": _word("pass"),
        "backend": _word("backend"),
        "path": _word("path"),
        **_RATES,
        "error": _error(True),
        "gradients' error": _error(False),
        "conversions ms": _number("conversions_ms", ".3f"),
        "first s": _number("first_call_s", ".2f"),
    },
    "decode": {
        "H/HV:requests": _word("shape"),
        "backend": _word("backend"),
        "path": _word("path"),
        **_RATES,
        "error": _error(True),
    },
    "same bits": {
        "H/HV:sequences": _word("shape"),
        "gates": _word("gates"),
        "norm": _word("norm"),
        "pass": _word("pass"),
        "backend": _word("backend"),
        "ms": _number("any_bits_ms", ".3f"),
        "ms, same bits": latency,
        "price": lambda row: f"{row['latency_ms'] / row['any_bits_ms']:.2f}x",
    },
    "pool": {
        "H/HV:sequences": _word("shape"),
        "work": _word("pass"),
        "backend": _word("backend"),
        "ms": latency,
        "ms, what it replaces": _number("beside_ms", ".3f"),
        "ratio": _number("ratio", ".3f"),
    },
    "plain PyTorch": {
        "decay": _word("decay"),
        "T": _word("T"),
        "pass": _word("pass"),
        "implementation": _word("implementation"),
        "ms": _number("latency_ms", ".3f"),
        "peak MB": _number("peak_mb", ".0f"),
    },
    "choosing": {"request from": _word("source"), "us": _number("latency_ms", ".2f", 1e3)},
    "issuing": {"backend": _word("backend"), "us": _number("latency_ms", ".1f", 1e3)},
    "cold start": {
        "backend": _word("backend"),
        "kernels": _word("kernels"),
        "first forward s": _number("latency_ms", ".2f", 1e-3),
        "whole process s": _number("wall_ms", ".2f", 1e-3),
    },
}
"""By kind of row: headers, and the text under each. * marks plain launches, † a difference."""


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of text for rows of one kind; empty columns are left out."""
    columns = COLUMNS[rows[0]["kind"]]
    texts = {header: [text(row) for row in rows] for header, text in columns.items()}
    kept = {header: x for header, x in texts.items() if set(x) != {"-"}}
    return list(kept), [list(line) for line in zip(*kept.values(), strict=True)]
