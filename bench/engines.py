"""What the scripts share that time gdn behind an engine's interface, beside the engine's own
kernels: their options, rows, agreement with plain PyTorch, tables and files."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from shapes import make_case
from torch import Tensor

from gdn.compare.environment import environment
from gdn.compare.files import require_writable
from gdn.compare.timing import Timing, gpu_times, wall_times
from gdn.testing import TOLERANCE, relative_error

PREFILLS = "1x8192,1x512,1x2048,8x1024,1024+7168,64x1-300"
"""An engine's kernels are tuned on the first one, whatever it is."""
KINDS = ("prefill", "decode", "verify")
DRAFTS = 4
"""Tokens of a sequence in a verification."""
OWN = "triton"
"""The engine's kernel that the others are compared with."""

Call = Callable[[Any, Tensor], Tensor]
"""A row's work by a kernel on a pool, which it updates. Returns o."""


class NoKernel(Exception):
    """An engine has no kernel for a row."""


class Row(NamedTuple):
    """A call, which may raise `NoKernel`, and what makes a pool of random states for it."""

    call: Call
    make_pool: Callable[[], Tensor]


class Layer:
    """Heads, size K = V and gate parameters of one layer on one rank."""

    def __init__(self, heads: str, K: int, device: torch.device, dtype: torch.dtype) -> None:
        self.H, self.HV = (int(x) for x in heads.split("/"))
        self.K, self.device, self.dtype = K, device, dtype
        self.sizes = [self.H * K, self.H * K, self.HV * K]
        self.gate = {name: torch.randn(self.HV, device=device) / 2 for name in ("A_log", "dt_bias")}

    def draw(self, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in one [T, 2 H K + HV V], and a and b [T, HV]."""
        widths = (sum(self.sizes), self.HV, self.HV)
        drawn = (torch.randn(T, n, device=self.device, dtype=self.dtype) for n in widths)
        return tuple(drawn)  # type: ignore[return-value]

    def bounds(self, lengths: list[int]) -> Tensor:
        """Where packed sequences begin and end, [N + 1]."""
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).int()

    def slots(self, N: int, of: int) -> Tensor:
        """N of so many slots, in no order."""
        order = torch.randperm(of, generator=torch.Generator().manual_seed(0))
        return order[:N].int().to(self.device)


def parse(description: str, arguments: list[str] | None) -> argparse.Namespace:
    """The options of a script."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--heads", default="16/32", help="H/HV of a rank")
    parser.add_argument("--size", type=int, default=128, help="K = V")
    parser.add_argument("--backends", default="tilelang,triton" if on_gpu else "torch")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which rows")
    parser.add_argument("--prefill", default=PREFILLS, help="shapes without heads")
    parser.add_argument("--batches", default="1,8,64,256", help="of decode and verification")
    parser.add_argument("--seconds", type=float, default=1.0, help="of all kernels of a row")
    parser.add_argument("--json", type=Path, help="a file for the times, written after each row")
    args = parser.parse_args(arguments)
    if args.json is not None:
        require_writable("--json", args.json)
    args.device = torch.device("cuda" if on_gpu else "cpu")
    return args


def load(makers: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """The kernels that can be made. Why another cannot is printed."""
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:  # another package's
            print(f"{name}: {type(error).__name__}: {error}")
    return found


class Work(Protocol):
    """What makes an engine's rows: a prefill of sequences of these lengths, and a decode and a
    verification of N sequences."""

    def prefill(self, lengths: list[int]) -> Row: ...

    def decode(self, N: int) -> Row: ...

    def verify(self, N: int) -> Row: ...


def make_rows(work: Work, args: argparse.Namespace) -> Iterable[tuple[str, Row]]:
    """The rows that the options ask for, by name; each is made when it is its turn."""
    for kind in args.kinds.split(","):
        if kind not in KINDS:
            raise ValueError(f"--kinds must be of {', '.join(KINDS)}, got {kind!r}")
        if kind == "prefill":
            for shape in args.prefill.split(","):
                case = make_case(f"{args.heads}:{shape}", "model", torch.bfloat16)
                yield f"prefill {shape}", work.prefill(list(case.lengths or [case.T] * case.B))
        else:
            for n in args.batches.split(","):
                yield f"{kind} {n}", getattr(work, kind)(int(n))


class Comparison:
    """The times of an engine's kernels and gdn's, by row and kernel; see `run`."""

    def __init__(
        self, engine: str, package: str, kernels: dict[str, Any], reference: Any, layer: Layer
    ) -> None:
        """engine and package: its name, and that of its distribution; reference: the kernel by
        plain PyTorch."""
        self.engine, self.package = engine, package
        self.kernels, self.reference, self.layer = kernels, reference, layer
        self.times: dict[str, dict[str, Timing]] = {}
        self.refused: list[dict[str, str]] = []

    def run(self, work: Work, args: argparse.Namespace) -> None:
        """Print a table of the times, a row at a time, and the geometric means."""
        print("|", " | ".join(["ms", *self.kernels]), "|")
        print("| --- |" + " --- |" * len(self.kernels))
        with torch.inference_mode():
            for name, row in make_rows(work, args):
                self.times[name] = self.measure(name, row, args.seconds)
                cells = [_cell(self.times[name].get(kernel)) for kernel in self.kernels]
                print("|", " | ".join([name, *cells]), "|", flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(self.record(args), indent=1) + "\n")
        for line in self.means():
            gaps = f", {line['gaps']} with gaps in one time" if line["gaps"] else ""
            print(
                f"{line['kind']}: {line['kernel']} is {line['mean']:.2f} times as fast as "
                f"{self.engine}'s {OWN} ({line['rows']} rows{gaps})"
            )

    def agreeing(self, name: str, row: Row) -> dict[str, Any]:
        """The kernels whose output and pool are those of plain PyTorch."""
        before, states, after = row.make_pool(), row.make_pool(), row.make_pool()
        states.copy_(before)
        expected, found = row.call(self.reference, states), {}
        for kernel, made in self.kernels.items():
            after.copy_(before)
            try:
                o = row.call(made, after)
                errors = relative_error(o, expected), relative_error(after, states)
            except NoKernel:
                continue
            except Exception as error:  # one kernel's must not stop the others
                self._refuse(name, kernel, f"{type(error).__name__}: {error}")
                continue
            if all(error <= TOLERANCE[self.layer.dtype] for error in errors):  # NaN is not
                found[kernel] = made
            else:
                self._refuse(name, kernel, "off by {:.1e} in o, {:.1e} in states".format(*errors))
        return found

    def _refuse(self, row: str, kernel: str, reason: str) -> None:
        print(f"  {row}: {kernel}: {reason}")
        self.refused.append({"row": row, "kernel": kernel, "reason": reason})

    def measure(self, name: str, row: Row, seconds: float) -> dict[str, Timing]:
        """The time of each kernel that agrees: GPU time with the L2 cache flushed, by plain
        launches where a kernel cannot be captured, or wall time on a CPU."""
        runs = {}
        for kernel, made in self.agreeing(name, row).items():
            pool = row.make_pool()
            runs[kernel] = lambda made=made, pool=pool: row.call(made, pool)
        if self.layer.device.type == "cuda":
            return gpu_times(runs, dict.fromkeys(runs, True), seconds)
        return wall_times(runs, self.layer.device, min(seconds, 0.1))

    def means(self) -> list[dict[str, Any]]:
        """The geometric mean of `OWN`'s time over each other kernel's, by kind of row. gaps: rows
        in which one of the two was captured in a graph and the other was not."""
        found = []
        for kind in KINDS:
            for name in self.kernels:
                times = [
                    (t[OWN], t[name])
                    for row, t in self.times.items()
                    if row.startswith(kind) and {name, OWN} <= {*t}
                ]
                if times and name != OWN:
                    mean = statistics.geometric_mean(own.ms / other.ms for own, other in times)
                    gaps = sum(own.clock != other.clock for own, other in times)
                    line = {"kind": kind, "kernel": name, "mean": mean, "rows": len(times)}
                    found.append(line | {"gaps": gaps})
        return found

    def record(self, args: argparse.Namespace) -> dict[str, Any]:
        """What --json holds."""
        try:
            version = metadata.version(self.package)
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        return {
            "engine": f"{self.engine} {version}",
            "environment": environment(self.layer.device),
            "heads": args.heads,
            "size": args.size,
            "rows": [
                {"row": row, "kernel": kernel, **timing._asdict()}
                for row, times in self.times.items()
                for kernel, timing in times.items()
            ],
            "not_timed": self.refused,
            "means": self.means(),
        }


def _cell(timing: Timing | None) -> str:
    """A time, with * where launches were not captured."""
    if timing is None:
        return "-"
    return f"{timing.ms:.4f}{'*' if timing.clock == 'events' else ''} ± {timing.spread:.4f}"
