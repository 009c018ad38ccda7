"""The rows that `pytest bench --benchmark-json` wrote, and comparison with an older run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
IDENTITY = (
    "kind", "shape", "gates", "norm", "decay", "pass", "ranks", "layers", "source", "kernels",
    "implementation", "backend",
)  # fmt: skip
"""The fields that identify a row within a run. A row has only those of its kind. Rows of prefill
and decode have `decay` only where it is per channel."""
BASELINE = ("fla", "torch")
"""Speed-ups are over the first of these that is in a run."""
PEERS = ("fla", "flashqla", "flashinfer", "flashkda")
"""Backends that are adapters of other libraries. Every other backend of a run is ours."""
DECAYS = {"channel": "a decay per channel", "bounded": "a bounded decay per channel"}
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
        no row holds them (rows of dispatch do not)."""
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
    words = f"{words}, no norm" if row.get("norm") == "no" else words
    return f"{words}, {DECAYS[row['decay']]}" if "decay" in row else words


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


def beside_peers(rows: Iterable[Row]) -> Iterator[tuple[Row, Row]]:
    """Each row of ours with each row of a peer on the same setting."""
    for here in by_setting(rows).values():
        for row, peer in itertools.product(here, here):
            if row["backend"] not in PEERS and peer["backend"] in PEERS:
                yield row, peer


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
