"""One process of `test_context_parallel.py`: times calls whose tokens are split over ranks."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tuning import tune_quickly

import gdn
from gdn.compare.timing import capture
from gdn.testing import Case, Gates, make_inputs, with_gradients

Run = Callable[[], object]


class Setting(NamedTuple):
    """One sequence of T tokens, its heads and gates, a pass, a backend, and the ranks that share
    the tokens."""

    heads: str
    T: int
    gates: Gates
    which: str
    backend: str
    ranks: int

    def case(self, T: int) -> Case:
        """The part of a rank."""
        H, HV = (int(n) for n in self.heads.split("/"))
        return Case(
            "part", T=T, H=H, HV=HV, K=128, V=128, dtype=torch.bfloat16, gates=self.gates,
            initial_state=False,
        )  # fmt: skip


def measure(
    settings: list[Setting], ranks: int, folder: Path, rounds: int
) -> Iterator[tuple[Setting, Any]]:
    """Each setting with what `_time` finds of it on so many processes, as soon as it is found; if
    they end before, with the error."""
    results, arguments, count = folder / f"results-{ranks}", (settings, ranks, folder, rounds), 0
    results.touch()
    spawn: Any = mp.spawn  # type: ignore[attr-defined]
    processes = spawn(_rank, arguments, ranks, join=False, daemon=True)
    try:
        with results.open() as lines:
            for setting in settings:
                line = _wait_for_line(lines, processes)
                count += 1
                yield setting, json.loads(line)
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:  # type: ignore[attr-defined]
        for setting in settings[count:]:
            yield setting, f"{type(error).__name__}: {error}"[:500]
    finally:
        for process in processes.processes:
            process.terminate()


def _wait_for_line(lines: TextIO, processes: Any) -> str:
    """The next line that a process writes. What a process raises is raised here."""
    line = ""
    while not line.endswith("\n"):
        ended = processes.join(timeout=0.1)
        line += (rest := lines.readline())
        if ended and not rest:
            raise RuntimeError(f"the ranks ended after {lines.name} was written in part")
    return line


def _rank(rank: int, settings: list[Setting], ranks: int, folder: Path, rounds: int) -> None:
    on_gpu = torch.cuda.is_available()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    tune_quickly()  # fla tunes for minutes otherwise
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/group-{ranks}", rank=rank,
        world_size=ranks, timeout=timedelta(minutes=5),
    )  # fmt: skip
    for setting in settings:
        found = _time(setting, device, rounds)
        if rank == 0:
            with (folder / f"results-{ranks}").open("a") as results:
                results.write(json.dumps(found) + "\n")
    dist.destroy_process_group()


def _time(setting: Setting, device: torch.device, rounds: int) -> Any:
    """Medians over rounds of the slowest rank's milliseconds, of eager calls and, on a GPU, of
    replays of a CUDA graph (None: it cannot be captured); the error if one was raised."""
    try:
        run = make_run(setting, device)
        run()
        eager = _median(run, device, rounds)
    except Exception as error:  # all ranks raise alike, or the group times out
        return f"{type(error).__name__}: {error}"[:500]
    if device.type != "cuda":
        return eager, None
    graph = None
    with contextlib.suppress(Exception):
        graph = capture(run, "thread_local")
    torch.cuda.synchronize()
    captured = torch.tensor(int(graph is not None), device=device)
    dist.all_reduce(captured, dist.ReduceOp.MIN)
    return eager, _median(graph.replay, device, rounds) if graph and captured.item() else None


def _median(run: Run, device: torch.device, rounds: int) -> float:
    samples = torch.tensor([_once(run, device) for _ in range(rounds)], device=device)
    dist.all_reduce(samples, dist.ReduceOp.MAX)
    return float(statistics.median(samples.tolist()))


def _once(run: Run, device: torch.device) -> float:
    """Milliseconds of one call, which all ranks begin together."""
    dist.barrier()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    event: Any = torch.cuda.Event
    began, ended = event(enable_timing=True), event(enable_timing=True)
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended))


def make_run(setting: Setting, device: torch.device) -> Run:
    """One call on this rank's part. On one rank there is no context."""
    rank = dist.get_rank()
    inputs = make_inputs(setting.case(setting.T // setting.ranks), device, rank, draw=device)
    inputs |= {"output_final_state": False}
    train = setting.which != "fwd"
    inputs = with_gradients(inputs) if train else inputs
    call = _fla_call(inputs, setting) if setting.backend == "fla" else _own_call(inputs, setting)
    leaves = [x for x in inputs.values() if torch.is_tensor(x) and x.requires_grad]
    grad_o = torch.randn_like(inputs["v"]) if train else None

    def run() -> object:
        o = call()
        return torch.autograd.grad(o, leaves, grad_o) if train else o

    return run


def _own_call(inputs: dict[str, Any], setting: Setting) -> Callable[[], Any]:
    lengths = [setting.T // setting.ranks] * setting.ranks
    cp = gdn.ContextParallel(dist.group.WORLD, lengths=lengths) if setting.ranks > 1 else None
    return lambda: gdn.gated_delta_net(**inputs, cp=cp, backend=setting.backend)[0]


def _fla_call(inputs: dict[str, Any], setting: Setting) -> Callable[[], Any]:
    """fla's own function, with its own context."""
    from fla.ops.cp import build_cp_context
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    options: dict[str, Any] = {}
    if setting.ranks > 1:
        bounds = torch.tensor([0, setting.T], dtype=torch.int32, device=inputs["q"].device)
        options["cp_context"] = build_cp_context(bounds, dist.group.WORLD)
    given = {name: inputs[name] for name in ("q", "k", "v", "g", "beta")}
    return lambda: chunk_gated_delta_rule(**given, **options)[0]
