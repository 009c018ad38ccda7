"""The main job, `gdn compare`: every backend that can run a case, held against the float64
definition, then timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import gdn
from gdn import measure
from gdn.measure import Ceilings, Run, Timing
from gdn.testing import (
    TOLERANCE,
    Case,
    gradients,
    make_inputs,
    make_output_gradients,
    relative_error,
    run_definition,
    with_gradients,
)

CHECKED_TOKENS = 200
"""Tokens of the case on which agreement is tested: three chunks and a part (the definition goes
token by token)."""

PASSES = ("fwd", "fwd+bwd")
"""Forward alone, and forward with backward."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One pass of one backend: its path and clocks, and the rates and share of the roofline that
    the least work in the pass comes to in its GPU time (on a CPU: wall time)."""

    path: str
    wall: Timing
    gpu: Timing | None
    tflops: float
    gbytes: float
    roofline: float

    @property
    def ms(self) -> float:
        """The latency that the rates come from."""
        return (self.wall if self.gpu is None else self.gpu).ms


@dataclass(slots=True)
class Row:
    """One backend: the path of each pass that it can run and the reasons against one that it
    cannot; seconds that each pass's first call took, compiling and autotuning included; relative
    errors by tensor name; what failed, if anything did; what was timed."""

    backend: str
    paths: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, list[str]] = field(default_factory=dict)
    first_calls: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    passes: dict[str, Measurement] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What `compare` found: a row a backend, for `case`, after agreement on `checked`."""

    case: Case
    checked: Case
    environment: dict[str, Any]
    ceilings: Ceilings
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether every backend that ran agrees with the definition."""
        return all(row.failure is None for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The whole report in types that JSON has."""
        return {
            "case": _plain_case(self.case),
            "checked": _plain_case(self.checked),
            "environment": self.environment,
            "ceilings": self.ceilings._asdict(),
            "rows": [_plain_row(row) for row in self.rows],
        }


def _plain_case(case: Case) -> dict[str, Any]:
    return asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")}


def _plain_row(row: Row) -> dict[str, Any]:
    passes = {
        name: {
            "path": found.path,
            "wall": found.wall._asdict(),
            "gpu": found.gpu and found.gpu._asdict(),
            "tflops": found.tflops,
            "gbytes": found.gbytes,
            "roofline": found.roofline,
        }
        for name, found in row.passes.items()
    }
    return asdict(replace(row, passes={})) | {"passes": passes}


def shortened(case: Case) -> Case:
    """The case cut to about CHECKED_TOKENS tokens."""
    if case.lengths is None:
        return replace(case, T=min(case.T, CHECKED_TOKENS), B=1)
    share = max(1, CHECKED_TOKENS // max(1, len(case.lengths)))
    return replace(case, lengths=tuple(min(length, share) for length in case.lengths))


def make_rows(names: list[str], case: Case, device: torch.device) -> list[Row]:
    """A row a backend, with what it can run of the case and why not the rest."""
    rows = [Row(name) for name in names]
    inputs = make_inputs(case, device)
    for which, kwargs in zip(PASSES, (inputs, with_gradients(inputs)), strict=True):
        verdicts = {verdict.name: verdict for verdict in gdn.explain(**kwargs).verdicts}
        for row in rows:
            verdict = verdicts[row.backend]
            if verdict.path is None:
                row.refusals[which] = list(verdict.reasons)
            else:
                row.paths[which] = verdict.path
    return rows


def run(name: str, inputs: dict[str, Any], into: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """Outputs by name, and the gradients `into` gives, if any."""
    outputs = gdn.gated_delta_net(**inputs, backend=name)
    found = {} if into is None else gradients(outputs, inputs, into)  # type: ignore[arg-type]
    return outputs._asdict() | found


def truth(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Outputs and gradients of a case by the definition in float64, by name."""
    inputs = with_gradients(make_inputs(case, device), torch.float64)
    o, state = run_definition(inputs)
    found = gradients((o, state), inputs, make_output_gradients(case, device))
    return {"o": o.detach(), "final_state": state.detach()} | found


def prepare(case: Case, device: torch.device, which: str) -> tuple[dict[str, Any], Any]:
    """Inputs of one pass, and the gradients of its outputs or None: what `run` takes."""
    inputs = make_inputs(case, device)
    if which == PASSES[0]:
        return inputs, None
    return with_gradients(inputs), make_output_gradients(case, device)


def call_first(row: Row, case: Case, device: torch.device) -> None:
    """Each pass once, at the size that will be timed: what autotunes, tunes for that size. Fills in
    the row's first_calls, or its failure."""
    for which in row.paths:
        prepared = prepare(case, device, which)
        start = time.perf_counter()
        try:
            run(row.backend, *prepared)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # one backend's fault must not end the comparison of the others
            row.failure = f"{type(error).__name__}: {error}"
            return
        row.first_calls[which] = time.perf_counter() - start


def check(row: Row, case: Case, expected: dict[str, Tensor], device: torch.device) -> None:
    """Fill in the row's errors, and its failure if one of them is above tolerance."""
    got = run(row.backend, *prepare(case, device, list(row.paths)[-1]))
    row.errors = {name: relative_error(x.detach(), expected[name]) for name, x in got.items()}
    tolerance = TOLERANCE[case.dtype]
    over = [f"{name} {error:.1e}" for name, error in row.errors.items() if not error <= tolerance]
    if over:
        row.failure = f"relative error above {tolerance:g}: {', '.join(over)}"


def _time(rows: list[Row], case: Case, device: torch.device, limits: Ceilings, which: str) -> None:
    """Time one pass of all rows, interleaved, and write the measurements into them."""
    prepared = prepare(case, device, which)
    runs: dict[str, Run] = {
        row.backend: functools.partial(run, row.backend, *prepared) for row in rows
    }
    wall, gpu = measure.wall_times(runs, device), None
    if device.type == "cuda":
        infos = {info.name: info.capabilities for info in gdn.list_backends()}
        with torch.cuda.device(device):
            gpu = measure.gpu_times(
                runs, {n: infos[n].cuda_graph and case.lengths is None for n in runs}
            )
    least = measure.work(case, backward=which == PASSES[1])
    for row in rows:
        timing = wall[row.backend] if gpu is None else gpu[row.backend]
        row.passes[which] = Measurement(
            path=row.paths[which],
            wall=wall[row.backend],
            gpu=None if gpu is None else timing,
            tflops=least.flops / timing.ms / 1e9,
            gbytes=least.bytes / timing.ms / 1e6,
            roofline=limits.floor_ms(least) / timing.ms,
        )


def compare(
    case: Case,
    device: torch.device,
    backends: list[str] | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run, check and time a case on every backend (or those named); `step` hears of each of the
    `steps` stages.

    A backend that cannot run the case keeps its reasons. One that disagrees with the definition, or
    raises, keeps its failure and is never timed.
    """
    names = [info.name for info in gdn.list_backends()] if backends is None else backends
    checked = shortened(case)
    rows = make_rows(names, case, device)
    step("float64 definition")
    expected = truth(checked, device) if any(row.paths for row in rows) else {}
    for row in rows:
        step(f"first calls and agreement of {row.backend}")
        call_first(row, case, device)
        if row.paths and row.failure is None:
            check(row, checked, expected, device)
    step("ceilings of the device")
    limits = measure.ceilings(device, case.dtype)
    for which in PASSES:
        step(which)
        able = [row for row in rows if which in row.paths and row.failure is None]
        if able:
            _time(able, case, device, limits, which)
    return Report(case, checked, measure.environment(device), limits, rows)


def steps(backends: int) -> int:
    """How many stages `compare` goes through."""
    return backends + 2 + len(PASSES)
