"""Times the first calls of a new process, and prints them as JSON: `first_call.py BACKEND DEVICE`.

Seconds of each by itself, one after another: import of torch, start of CUDA (a tensor there),
import of gdn, then the first forward, training step and decode step that the backend can run. With
`--no-compiler` nvcc is hidden, and `import tilelang` fails. With `--warm-up` it ends with
`gdn.warmup`, which compiles what such calls may need later.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Seconds = dict[str, float]


def hide_compiler() -> None:
    """For the process: no nvcc is found, and tilelang cannot be imported."""
    sys.modules["tilelang"] = None  # type: ignore[assignment]
    os.environ |= {"PATH": "", "CUDA_HOME": "/nowhere", "CUDA_PATH": "/nowhere"}


def timed(seconds: Seconds, name: str, run: Callable[[], Any]) -> Any:
    """The result of a function, its time noted."""
    start = time.perf_counter()
    result = run()
    seconds[name] = time.perf_counter() - start
    print(f"{name} {seconds[name]:.2f} s", file=sys.stderr)
    return result


def measure(backend: str, device: str, warm_up: bool) -> Seconds:
    seconds: Seconds = {}
    torch = timed(seconds, "torch", lambda: __import__("torch"))

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def start() -> None:
        torch.ones(1, device=device).add_(1)
        wait()

    timed(seconds, "cuda", start)
    gdn = timed(seconds, "gdn", lambda: __import__("gdn"))
    import adapters
    from shapes import make_case, make_step_case

    from gdn.testing import make_inputs, with_gradients
    from gdn.testing.decode import make_step

    adapters.register()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads, T = ("16/32", 2048) if device == "cuda" else ("2/4", 256)  # a CPU takes seconds a call
    inputs = make_inputs(make_case(f"{heads}:1x{T}", "model", dtype), device)
    step = make_step(make_step_case(heads, 8, dtype), device)
    leaves = with_gradients(inputs)
    wait()

    def forward() -> None:
        gdn.gated_delta_net(**inputs, backend=backend)
        wait()

    def training() -> None:
        gdn.gated_delta_net(**leaves, backend=backend).o.sum().backward()
        wait()

    def decode() -> None:
        gdn.gated_delta_net_decode(**step, backend=backend)
        wait()

    for name, run in (("forward", forward), ("training", training), ("decode", decode)):
        with contextlib.suppress(gdn.BackendUnsupportedError):  # asked by the call, in its time
            timed(seconds, name, run)
    if warm_up:
        for call in (inputs, leaves, step):
            with contextlib.suppress(gdn.BackendUnsupportedError):
                gdn.warmup(**call, backend=backend)
    return seconds


if __name__ == "__main__":
    if "--no-compiler" in sys.argv:
        hide_compiler()
    print(json.dumps(measure(sys.argv[1], sys.argv[2], "--warm-up" in sys.argv)))
