"""Calls from prebuilt kernels, in a process without nvcc in which `import tilelang` fails.

python tests/prebuilt_calls.py list FILE     the kernels that they need, one a line
python tests/prebuilt_calls.py run cpu       their launches are checked, nothing is computed
python tests/prebuilt_calls.py run cuda      results are compared with the definition
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.modules["tilelang"] = None  # type: ignore[assignment]
    os.environ |= {"PATH": "", "CUDA_HOME": "/nowhere", "CUDA_PATH": "/nowhere"}

import torch
from gdn.backends.tilelang import TileLangBackend, build, kernels, launch, prebuilt, streams
from gdn.backends.tilelang.backward import plan as backward
from gdn.backends.tilelang.decode import plan as decode
from gdn.backends.tilelang.forward import plan as forward

import gdn
from gdn import calls
from gdn.testing import Case, check, make_inputs, with_gradients
from gdn.testing.decode import StepCase, make_step

HEADS: dict[str, Any] = {"H": 8, "HV": 16, "K": 128, "V": 128, "dtype": torch.bfloat16}
LAYER = Case("layer", T=70, B=5, fused=True, gates="model", **HEADS)
PACKED = Case("packed", lengths=(70, 1, 64, 0, 65), fused=True, gates="model", **HEADS)
FIRST = Case(  # the kernels of bench/first_call.py, and of STEP's
    "first", T=70, l2norm=True, gates="model", state_v_first=True, **HEADS | {"H": 16, "HV": 32}
)
STEP = StepCase(
    "step", B=8, fused=True, gates="model", state_v_first=True, full=True,
    **HEADS | {"H": 16, "HV": 32},
)  # fmt: skip


class Recorded(TileLangBackend):
    """The backend on a CPU, where `record` stands in for launches."""

    name = "recorded"
    capabilities = replace(TileLangBackend.capabilities, devices=("cpu",), min_sm=None, max_sm=None)


def jobs() -> list[kernels.Job]:
    """The kernels of the calls below."""
    backend, found = TileLangBackend(), []
    for inputs, gradients in (
        (make_inputs(LAYER), False), (make_inputs(PACKED), False), (make_inputs(FIRST), False),
        (make_inputs(FIRST), True), (make_step(STEP), False),
    ):  # fmt: skip
        tokens = [inputs.pop(name) for name in ("q", "k", "v", "g", "beta")]
        found += backend.jobs(calls.make(*tokens, inputs, False), gradients)
    return list({build.write_job(job): job for job in found}.values())


def describe(x: Any) -> str:
    """An argument as `prebuilt.Entry.arguments` has it."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}[{x.dim()}]"
    return type(x).__name__


def fits(x: Any, wanted: str) -> bool:
    """Whether an argument is what a kernel is launched with."""
    if x is None:
        return wanted.endswith("]")
    if isinstance(x, torch.Tensor):
        return describe(x) == wanted
    return wanted.startswith(describe(x))  # int32, int64, float32


def record(
    launched: list[str], places: set[Path]
) -> Callable[[list[kernels.Job]], list[Callable[..., None]]]:
    """A stand-in for `launch.launchers`: loads the prebuilt kernels, and checks what they are
    launched with against their entries."""

    def launchers(given: list[kernels.Job]) -> list[Callable[..., None]]:
        launch.launchers(given)

        def check_launch(job: kernels.Job) -> Callable[..., None]:
            _, library = prebuilt.find(job[0].name, job[1]) or ("", None)
            assert library is not None
            entry = prebuilt.read_entry(
                library.parent / f"{prebuilt.key(job[0].name, job[1])}.json"
            )
            assert entry is not None

            def check_arguments(*arguments: Any) -> None:
                launched.append(entry.kernel)
                places.add(library.parent)
                assert len(arguments) == len(entry.arguments), entry.name
                for n, (x, wanted) in enumerate(zip(arguments, entry.arguments, strict=True)):
                    assert fits(x, wanted), (entry.name, n, describe(x), wanted)

            return check_arguments

        return [check_launch(job) for job in given]

    return launchers


def run_on_cpu() -> None:
    """Every launch of forward, a training step and decode has the arguments of its kernel."""
    launched: list[str] = []
    places: set[Path] = set()
    for module in (forward, backward, decode):
        module.launchers = record(launched, places)  # type: ignore[attr-defined]
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fake: Any = torch.cuda
    fake.current_stream = lambda device: stream
    fake.stream = lambda stream: contextlib.nullcontext()
    streams._aside = lambda device: stream  # type: ignore[attr-defined]
    gdn.register_backend(Recorded())
    for case in (LAYER, PACKED, FIRST):
        gdn.gated_delta_net(**make_inputs(case), backend="recorded")
    out = gdn.gated_delta_net(**with_gradients(make_inputs(FIRST)), backend="recorded")
    assert out.final_state is not None
    (out.o.sum() + out.final_state.sum()).backward()
    gdn.gated_delta_net_decode(**make_step(STEP), backend="recorded")
    wanted = {kernel.name for kernel, _ in jobs()}
    assert set(launched) == wanted, (set(launched), wanted)
    print(f"{len(launched)} launches of {len(wanted)} kernels in", *places)


def run_on_gpu() -> None:
    """Outputs, states and gradients agree with the float64 definition."""
    for case in (LAYER, PACKED, FIRST):
        check.assert_agrees("tilelang", case, make_inputs(case, "cuda"))
    check.assert_agrees("tilelang", FIRST, with_gradients(make_inputs(FIRST, "cuda")))
    check.assert_step_agrees("tilelang", STEP, make_step(STEP, "cuda"))
    print("forward, gradients and decode agree with the definition")


if __name__ == "__main__":
    if sys.argv[1] == "list":
        Path(sys.argv[2]).write_text("".join(f"{build.write_job(job)}\n" for job in jobs()))
    else:
        {"cpu": run_on_cpu, "cuda": run_on_gpu}[sys.argv[2]]()
    assert sys.modules["tilelang"] is None
    assert not any(name.startswith("tilelang.") for name in sys.modules)
