"""`pytest bench --ahead`: compile the kernels of all rows first, one process per backend and head
count. Without it peers compile for minutes, one head count after another.

    python bench/ahead.py fla 16/32:1x8192,16/32:8x1024 fwd,bwd fused head

With `kernels` in place of a backend it prints, on any machine, the TileLang kernels that rows of
prefill need. `gdn build-kernels --kernels-in FILE --out DIR` builds them, and with GDN_KERNELS=DIR
those rows compile nothing with TileLang:

    python bench/ahead.py kernels '2/8|16/32:1x8192|8x1024' fwd,bwd no head > FILE
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from gdn.backends.tilelang import BACKEND
from gdn.backends.tilelang.build import write_job
from shapes import CONDITIONS, Decay, Norm, expand, make_case
from tuning import THREADS

from gdn.compare.options import make_call
from gdn.testing import agreement

Job = tuple[str, str, str, str, str]
"""Arguments of a process: a backend, shapes of one head count, passes, a norm and a decay."""
UNTUNED = {"TRITON_CACHE_AUTOTUNING": "0", "FLA_CACHE_RESULTS": "0"}
"""Triton and fla must not keep autotuning results here: other processes disturb the timings."""


def jobs(
    backends: Iterable[str],
    shapes: Iterable[str],
    passes: Iterable[str],
    norms: Iterable[str],
    decays: Iterable[str],
) -> list[Job]:
    """One job per backend, head count, norm and decay. Plain PyTorch compiles nothing."""
    groups: dict[str, list[str]] = {}
    for shape in shapes:
        groups.setdefault(shape.partition(":")[0], []).append(shape)
    compiled = [name for name in backends if name != "torch"]
    which = ",".join(passes)
    return [
        (name, ",".join(group), which, norm, decay)
        for group, name, norm, decay in product(groups.values(), compiled, norms, decays)
        if (norm, decay) in CONDITIONS
    ]


def compile_ahead(found: list[Job]) -> list[str]:
    """Run the jobs in parallel, one per `THREADS` CPU cores, and return their output."""
    environment = os.environ | UNTUNED | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(job: Job) -> str:
        command = [sys.executable, __file__, *job]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr.strip()

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // THREADS)) as pool:
        return list(pool.map(run, found))


def kernels(shapes: str, passes: str, norm: Norm, decay: Decay) -> list[str]:
    """TileLang's kernels of rows in bfloat16, as `gdn build-kernels` takes them."""
    found: dict[str, None] = {}
    for shape in expand(shapes):
        call = make_call(make_case(shape, "model", torch.bfloat16, norm, decay))
        for backward in {which != "fwd" for which in passes.split(",")}:
            found |= dict.fromkeys(map(write_job, BACKEND.warmup_jobs(call, backward)))
    return list(found)


def main(backend: str, shapes: str, passes: str, norm: Norm, decay: Decay) -> None:
    """Call the backend once with every shape, and print how long that took."""
    if backend == "kernels":
        print(*kernels(shapes, passes, norm, decay), sep="\n")
        return
    from suite import DEVICE, DTYPE  # registers peers

    for shape in shapes.split(","):
        start = time.perf_counter()
        try:
            inputs = agreement.make(make_case(shape, "model", DTYPE, norm, decay), DEVICE)
            for which in {"fwd" if which == "fwd" else "fwd+bwd" for which in passes.split(",")}:
                inputs.run(backend, which)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            outcome = f"{time.perf_counter() - start:.1f} s"
        except Exception as error:  # the row itself reports it again
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        print(f"{backend} {shape}: {outcome} (norm {norm}, decay per {decay})")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
