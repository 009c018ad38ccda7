"""`gdn compare`: every backend that can run a case is checked against float64, then timed.
`pytest bench` measures its rows with the same `Comparison`."""

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
    """One timed pass of one backend.

    tflops, gbytes and roofline are computed from the least work of the pass and its GPU time (on a
    CPU its wall time).
    """

    path: str
    wall: Timing | None
    gpu: Timing | None
    tflops: float
    gbytes: float
    roofline: float
    peak_bytes: int | None

    @property
    def ms(self) -> float:
        """The latency in the rates: GPU time, or wall time on a CPU."""
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
    """One backend of a comparison. A pass is "fwd", "bwd", "fwd+bwd" or "decode".

    Attributes:
        paths: the internal path of each pass that the backend can run.
        refusals: the reasons against each pass that it cannot run.
        first_calls: seconds of each first call, compiling and autotuning included.
        errors: relative errors by tensor name, at the size that is timed.
        failures: the message of each pass that disagreed or raised.
        passes: the measurement of each timed pass.
    """

    backend: str
    paths: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, list[str]] = field(default_factory=dict)
    first_calls: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    passes: dict[str, Measurement] = field(default_factory=dict)

    def admit(self, which: str, verdict: gdn.Verdict) -> None:
        """Record the path of a pass, or the reasons why it cannot run."""
        if verdict.path is None:
            self.refusals[which] = list(verdict.reasons)
        else:
            self.paths[which] = verdict.path

    def fit(self, which: str) -> bool:
        """Whether the pass can run and agreed, and so may be timed."""
        return which in self.paths and which not in self.failures


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `compare`: one row per backend."""

    case: Case
    environment: dict[str, Any]
    ceilings: Ceilings
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether at least one backend can run the case, and none failed."""
        return any(row.paths for row in self.rows) and not any(row.failures for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The whole report in JSON's types."""
        return {
            "case": plain_case(self.case),
            "environment": self.environment,
            "ceilings": self.ceilings._asdict(),
            "rows": [_plain_row(row) for row in self.rows],
        }


def plain_case(case: Case) -> dict[str, Any]:
    """A case in JSON's types."""
    plain = {n: str(x) if isinstance(x, torch.dtype) else x for n, x in asdict(case).items()}
    return plain | {"dtype": str(case.dtype).removeprefix("torch.")}


def plain_timing(timing: Timing | None) -> dict[str, Any] | None:
    """A timing in JSON's types."""
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
    """One case on one device. Tensors are drawn once; `rows` are in the order of `backends`."""

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
        needed = PASSES[-1] if self.differentiates else "fwd"
        self.reference = agreement.make_reference(case, device, needed)
        self.inputs = self.reference.full
        self._explain()

    def _explain(self) -> None:
        """Record which passes each row can run, and the reasons against the others."""
        for which in self.passes:
            kwargs = self.inputs.plain if which == "fwd" else self.inputs.leaves
            verdicts = {verdict.name: verdict for verdict in gdn.explain(**kwargs).verdicts}
            for row in self.rows:
                row.admit(which, verdicts[row.backend])

    def check(self, row: Row) -> None:
        """Run each pass once and compare it with the reference. Fills in the row's first_calls,
        errors and failures."""
        for calls in ("fwd", "fwd+bwd")[: 1 + self.differentiates]:
            affected = [which for which in row.paths if (which == "fwd") == (calls == "fwd")]
            if not affected:
                continue
            try:
                row.first_calls[calls] = self._first_call(row.backend, calls)
                short, full = self.reference.errors(row.backend, calls)
            except Exception as error:  # one backend's error must not stop the others
                fault = f"{type(error).__name__}: {error}"
                row.failures |= dict.fromkeys(affected, fault)
                continue
            row.errors |= {n: x for n, x in full.items() if n not in row.errors}
            for errors in (short, full):
                failure = self.reference.failure(errors)
                if failure is not None:
                    row.failures |= dict.fromkeys(affected, failure)

    def _first_call(self, backend: str, which: str) -> float:
        """Seconds of the first call, at the timed size, so that autotuning is for that size."""
        start = time.perf_counter()
        self.inputs.run(backend, which)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def call(self, backend: str, which: str) -> Run:
        """One pass of a backend as a function without arguments. Backward alone repeats the
        backward of one forward, which runs here on the stream that captures graphs."""
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

    def gpu_times(self, which: str, names: list[str], seconds: float = 1.0) -> dict[str, Timing]:
        """GPU time of one pass by backend, interleaved, in about so many seconds; measured once,
        then remembered. A backward that cannot be captured in a graph is timed as "fwd+bwd" minus
        "fwd"."""
        found = self._gpu.setdefault(which, {})
        graphs = {i.name: i.capabilities.cuda_graph for i in gdn.list_backends()}
        new = [name for name in names if name not in found]
        if which == "bwd":
            runs = {name: self.call(name, which) for name in new if graphs[name]}
            times = gpu_times(runs, graphs, seconds)
            found |= {name: timing for name, timing in times.items() if timing.clock == "graph"}
            rest = [name for name in new if name not in found]
            both, forward = (self.gpu_times(pair, rest, seconds) for pair in ("fwd+bwd", "fwd"))
            found |= {name: both[name].less(forward[name]) for name in rest}
        elif new:
            runs = {name: self.call(name, which) for name in new}
            found |= gpu_times(runs, graphs, seconds)
        return found

    def time(self, which: str, limits: Ceilings, wall: bool = True, seconds: float = 1.0) -> None:
        """Time one pass of all rows that are fit, and store the measurements in the rows. Without
        `wall`, only GPU time; `seconds` is what that takes, about."""
        names = [row.backend for row in self.rows if row.fit(which)]
        walls, gpus = {}, {}
        if wall and names:
            runs = {name: self.call(name, which) for name in names}
            walls = wall_times(runs, self.device)
            del runs
        if self.device.type == "cuda" and names:
            with torch.cuda.device(self.device):
                gpus = self.gpu_times(which, names, seconds)
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
    """Run, check and time a case on every backend, or on those named. `step` is called at the start
    of each stage with a text.

    The row of a backend that cannot run the case holds the reasons. A backend that disagrees with
    float64, or raises, is not timed, and its row holds the failure.
    """
    names = [info.name for info in gdn.list_backends()] if backends is None else backends
    step("reference in float64")
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
    """The number of stages of `compare`."""
    return backends + 2 + len(PASSES)
