"""One decode step on every backend: checked against the definition in float64, then timed."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

import gdn
from gdn.testing import TOLERANCE, agreement
from gdn.testing.decode import StepCase, copy_pool

from .comparison import Measurement, Row, rates
from .roofline import Ceilings, least_step_work
from .timing import Run, Timing, gpu_times, peak_memory, wall_times

DECODE = "decode"


class StepComparison:
    """One step on one device, with the interface of `Comparison`; its only pass is `DECODE`."""

    def __init__(self, case: StepCase, device: torch.device, backends: Iterable[str]) -> None:
        self.case, self.device = case, device
        self.rows = [Row(name) for name in backends]
        self.inputs = agreement.make_step_inputs(case, device)
        verdicts = {v.name: v for v in gdn.explain(**self.inputs.kwargs).verdicts}
        for row in self.rows:
            row.admit(DECODE, verdicts[row.backend])

    def check(self, row: Row) -> None:
        """Compare one step with the definition. Fills in the row's errors and its failure."""
        if DECODE not in row.paths:
            return
        try:
            row.errors = self.inputs.errors(row.backend)
        except Exception as error:  # one backend's error must not stop the others
            row.failures[DECODE] = f"{type(error).__name__}: {error}"
            return
        limit = TOLERANCE[self.case.dtype]
        over = [f"{name} {x:.1e}" for name, x in row.errors.items() if not x <= limit]
        if over:
            row.failures[DECODE] = f"relative error above {limit:g}: {', '.join(over)}"

    def call(self, backend: str, which: str = DECODE) -> Run:
        """A step as a function without arguments, on its own copy of the pool. Every call updates
        the states again; the decay keeps them bounded."""
        kwargs = self.inputs.kwargs | {"state": copy_pool(self.inputs.kwargs["state"])}
        return functools.partial(gdn.gated_delta_net_decode, **kwargs, backend=backend)

    def time(self, which: str, limits: Ceilings, wall: bool = True, seconds: float = 1.0) -> None:
        """Time all rows that are fit, interleaved, and store the measurements in the rows."""
        fit = [row for row in self.rows if row.fit(which)]
        runs = {row.backend: self.call(row.backend) for row in fit}
        walls: dict[str, Timing] = wall_times(runs, self.device) if wall else {}
        gpus: dict[str, Timing] = {}
        if self.device.type == "cuda" and runs:
            graphs = {i.name: i.capabilities.cuda_graph for i in gdn.list_backends()}
            with torch.cuda.device(self.device):
                gpus = gpu_times(runs, graphs, seconds)
        least = least_step_work(self.case)
        for row in fit:
            timing = gpus.get(row.backend, walls.get(row.backend))
            ms = timing.ms if timing is not None else float("nan")
            row.passes[which] = Measurement(
                path=row.paths[which],
                wall=walls.get(row.backend),
                gpu=gpus.get(row.backend),
                **rates(least, ms, limits),
                peak_bytes=peak_memory(runs[row.backend], self.device),
            )
