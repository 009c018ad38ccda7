"""Processes for tests: of one group (gloo, or NCCL with a GPU each), what they do when one of them
fails, and a fork."""

from __future__ import annotations

import datetime
import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import gdn
from gdn.testing import Case, make_inputs

LIMIT = 60.0
"""Seconds after which a collective gives up. On GPUs four times as many, since kernels compile in
the calls."""


def fork(run: Callable[[], object]) -> int:
    """A process that runs a function, and exits with 1 if that raises. Returns its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads are not copied: it needs none
        process = os.fork()
    if process:
        return process
    try:
        run()
    except BaseException:
        os._exit(1)
    os._exit(0)


def start(
    run: Callable[..., None],
    ranks: int,
    folder: Path,
    limit: float,
    *args: Any,
    device: str = "cpu",
) -> None:
    """Run `run(rank, *args)` in new processes of one group. A rank that fails ends all.
    AssertionError with the tracebacks, or if they take longer than `limit` seconds. device: "cpu"
    for gloo, "cuda" for NCCL, a GPU for each process."""
    context = mp.spawn(_enter, (run, ranks, folder, args, device), ranks, join=False)
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise AssertionError(f"the ranks did not end within {limit} s")
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        found = sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime_ns)
        raise AssertionError("\n".join(path.read_text() for path in found)) from error
    finally:
        for process in context.processes:
            process.kill()


def _enter(
    rank: int, run: Callable[..., None], ranks: int, folder: Path, args: Any, device: str
) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT)
    if device == "cuda":
        torch.cuda.set_device(rank)
        limit *= 4
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank,
        world_size=ranks, timeout=limit,
    )  # fmt: skip
    try:
        run(rank, *args)
        dist.barrier()
    except Exception:
        (folder / f"failed-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    dist.destroy_process_group()


def wait_in_vain(rank: int) -> None:
    """Rank 1 goes on without calling the op, so that rank 0 runs into the time-out of the group."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    if rank == 0:
        cp = gdn.ContextParallel(group, lengths=(8, 8))
        with pytest.raises(RuntimeError, match=r"(?i)timed out"):
            gdn.gated_delta_net(**make_inputs(Case("alone", T=8)), cp=cp, backend="torch")


def fail_alone(rank: int) -> None:
    """Rank 1 raises; rank 0 waits for it in the op's exchange. Before that, `wait_in_vain`."""
    wait_in_vain(rank)
    inputs = make_inputs(Case("alone", T=8 + rank))
    cp = gdn.ContextParallel(dist.group.WORLD, lengths=(8, 8))
    gdn.gated_delta_net(**inputs, cp=cp, backend="torch")
