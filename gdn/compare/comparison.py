"""The main job, `gdn compare`: every backend that can run a case, held against float64, then
timed. `pytest bench` measures its rows with the same `Comparison`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import gdn
from gdn.testing import Case, agreement

from . import environment
from .roofline import PASSES, Ceilings, Work, ceilings, least_work
from .timing import Run, Timing, capture_stream, gpu_times, peak_memory, wall_times


@dataclass(frozen=True, slots=True)
class Measurement:
    """One pass of one backend: its path and clocks, the rates and share of the roofline that the
    least work in the pass comes to in its GPU time (on a CPU: wall time), and its peak memory."""

    path: str
    wall: Timing | None
    gpu: Timing | None
    tflops: float
    gbytes: float
    roofline: float
    peak_bytes: int | None

    @property
    def ms(self) -> float:
        """The latency that the rates come from."""
        timing = self.wall if self.gpu is None else self.gpu
        return timing.ms if timing else float("nan")


def rates(least: Work, ms: float, limits: Ceilings) -> dict[str, float]:
    """TFLOPS, GB/s and the share of the roofline of a call that takes `ms`."""
    return {
        "tflops": least.flops / ms / 1e9,
        "gbytes": least.bytes / ms / 1e6,
        "roofline": limits.floor_ms(least) / ms,
    }


@dataclass(slots=True)
class Row:
    """One backend: the path of each pass that it can run and the reasons against one that it
    cannot; seconds that each pass's first call took, compiling and autotuning included; relative
    errors by tensor name, at the size that is timed; what failed, by pass; what was timed."""

    backend: str
    paths: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, list[str]] = field(default_factory=dict)
    first_calls: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    passes: dict[str, Measurement] = field(default_factory=dict)

    def admit(self, which: str, verdict: gdn.Verdict) -> None:
        """Note the path of a pass, or why it cannot run."""
        if verdict.path is None:
            self.refusals[which] = list(verdict.reasons)
        else:
            self.paths[which] = verdict.path

    def fit(self, which: str) -> bool:
        """Whether the pass can run and agreed, and so may be timed."""
        return which in self.paths and which not in self.failures


@dataclass(frozen=True, slots=True)
class Report:
    """What `compare` found: a row a backend, for `case`."""

    case: Case
    environment: dict[str, Any]
    ceilings: Ceilings
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether any backend ran, and all that did agree."""
        return any(row.paths for row in self.rows) and not any(row.failures for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The whole report in types that JSON has."""
        return {
            "case": plain_case(self.case),
            "environment": self.environment,
            "ceilings": self.ceilings._asdict(),
            "rows": [_plain_row(row) for row in self.rows],
        }


def plain_case(case: Case) -> dict[str, Any]:
    """A case in types that JSON has."""
    plain = {n: str(x) if isinstance(x, torch.dtype) else x for n, x in asdict(case).items()}
    return plain | {"dtype": str(case.dtype).removeprefix("torch.")}


def plain_timing(timing: Timing | None) -> dict[str, Any] | None:
    """A timing in types that JSON has."""
    return None if timing is None else timing._asdict()


def _plain_row(row: Row) -> dict[str, Any]:
    passes = {
        name: {
            field: plain_timing(x) if isinstance(x, Timing) else x
            for field in Measurement.__slots__
            for x in [getattr(found, field)]
        }
        for name, found in row.passes.items()
    }
    return asdict(replace(row, passes={})) | {"passes": passes}


class Comparison:
    """One case on one device: tensors drawn once, `rows` in the order of `backends`."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        backends: Iterable[str],
        passes: Sequence[str] = PASSES,
    ) -> None:
        self.case, self.device, self.passes = case, device, passes
        self.rows = [Row(name) for name in backends]
        self._gpu: dict[str, dict[str, Timing]] = {}
        self.differentiates = passes != PASSES[:1]
        self.judge = agreement.appoint(case, device, PASSES[-1] if self.differentiates else "fwd")
        self.inputs = self.judge.full
        self._explain()

    def _explain(self) -> None:
        """Fill in what each row can run, and why not the rest."""
        for which in self.passes:
            kwargs = self.inputs.plain if which == "fwd" else self.inputs.leaves
            verdicts = {verdict.name: verdict for verdict in gdn.explain(**kwargs).verdicts}
            for row in self.rows:
                row.admit(which, verdicts[row.backend])

    def check(self, row: Row) -> None:
        """Each pass's first call, then agreement; fills in the row's first_calls, errors and
        failures."""
        for calls in ("fwd", "fwd+bwd")[: 1 + self.differentiates]:
            affected = [which for which in row.paths if (which == "fwd") == (calls == "fwd")]
            if not affected:
                continue
            try:
                row.first_calls[calls] = self._first_call(row.backend, calls)
                short, full = self.judge.errors(row.backend, calls)
            except Exception as error:  # one backend's fault must not end the others' comparison
                fault = f"{type(error).__name__}: {error}"
                row.failures |= dict.fromkeys(affected, fault)
                continue
            row.errors |= {n: x for n, x in full.items() if n not in row.errors}
            for errors in (short, full):
                objection = self.judge.objection(errors)
                if objection is not None:
                    row.failures |= dict.fromkeys(affected, objection)

    def _first_call(self, backend: str, which: str) -> float:
        """Seconds, at the size that will be timed: what autotunes, tunes for that size."""
        start = time.perf_counter()
        self.inputs.run(backend, which)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def call(self, backend: str, which: str) -> Run:
        """One pass of a backend as a function without arguments. Backward alone goes back, again
        and again, through one forward, made on the stream that graphs are captured on."""
        if which != "bwd":
            return functools.partial(self.inputs.run, backend, which)
        if self.device.type != "cuda":
            outputs = self.inputs.forward(backend, leaves=True)
        else:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            with torch.cuda.stream(capture_stream(index)):
                outputs = self.inputs.forward(backend, leaves=True)
            torch.cuda.synchronize(self.device)
        return functools.partial(self.inputs.backward, outputs, again=True)

    def gpu_times(self, which: str, names: list[str]) -> dict[str, Timing]:
        """GPU time of one pass by backend, interleaved, measured once. Backward that no graph can
        hold is forward and backward less forward."""
        found = self._gpu.setdefault(which, {})
        graphs = {i.name: i.capabilities.cuda_graph for i in gdn.list_backends()}
        new = [name for name in names if name not in found]
        if which == "bwd":
            runs = {name: self.call(name, which) for name in new if graphs[name]}
            times = gpu_times(runs, graphs)
            found |= {name: timing for name, timing in times.items() if timing.clock == "graph"}
            loose = [name for name in new if name not in found]
            both, forward = (self.gpu_times(other, loose) for other in ("fwd+bwd", "fwd"))
            found |= {name: both[name].less(forward[name]) for name in loose}
        elif new:
            runs = {name: self.call(name, which) for name in new}
            found |= gpu_times(runs, graphs)
        return found

    def time(self, which: str, limits: Ceilings, wall: bool = True) -> None:
        """Time one pass of all rows that are fit, and write the measurements into them. Without
        `wall`, GPU time alone."""
        names = [row.backend for row in self.rows if row.fit(which)]
        walls, gpus = {}, {}
        if wall and names:
            runs = {name: self.call(name, which) for name in names}
            walls = wall_times(runs, self.device)
            del runs
        if self.device.type == "cuda" and names:
            with torch.cuda.device(self.device):
                gpus = self.gpu_times(which, names)
        least = least_work(self.case, which)
        for row in (row for row in self.rows if row.fit(which)):
            timing = gpus.get(row.backend, walls.get(row.backend))
            ms = timing.ms if timing is not None else float("nan")
            row.passes[which] = Measurement(
                path=row.paths[which],
                wall=walls.get(row.backend),
                gpu=gpus.get(row.backend),
                **rates(least, ms, limits),
                peak_bytes=peak_memory(self.call(row.backend, which), self.device),
            )


def compare(
    case: Case,
    device: torch.device,
    backends: list[str] | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run, check and time a case on every backend (or those named); `step` hears of each of the
    `steps` stages.

    A backend that cannot run the case keeps its reasons. One that disagrees with float64, or
    raises, keeps its failure and is never timed.
    """
    names = [info.name for info in gdn.list_backends()] if backends is None else backends
    step("truth in float64")
    comparison = Comparison(case, device, names)
    for row in comparison.rows:
        step(f"first calls and agreement of {row.backend}")
        comparison.check(row)
    step("ceilings of the device")
    limits = ceilings(device, case.dtype)
    for which in PASSES:
        step(which)
        comparison.time(which, limits)
    return Report(case, environment.environment(device), limits, comparison.rows)


def steps(backends: int) -> int:
    """How many stages `compare` goes through."""
    return backends + 2 + len(PASSES)
