"""Measurements: the least work by hand, the relative error, the clocks."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch

from gdn.compare import timing
from gdn.compare.environment import environment
from gdn.compare.roofline import Ceilings, ceilings, least_step_work, least_work
from gdn.testing import Case, relative_error
from gdn.testing.decode import StepCase

QWEN = Case("model", T=32768, H=16, HV=32, K=128, V=128, dtype=torch.bfloat16, initial_state=False)


def test_work_of_a_chunk_and_a_token() -> None:
    """Counted by hand: 10.6 million operations per chunk and value head; 520 + 512 / G bytes per
    token and value head, plus the final state. G is HV / H."""
    work = least_work(QWEN, "fwd")
    assert work.flops / (512 * 32) == pytest.approx(10.6e6, rel=0.01)
    state = 32 * 128 * 128 * 4
    assert (work.bytes - state) / (32768 * 32) == 520 + 512 / 2
    assert Ceilings(790e12, 4.27e12).floor_ms(work) == pytest.approx(0.22, rel=0.02)
    back, both = (least_work(QWEN, which) for which in ("bwd", "fwd+bwd"))
    assert both.flops == 4 * work.flops
    assert 2 * work.bytes < both.bytes < 4 * work.bytes
    assert [a + b for a, b in zip(work, back, strict=True)] == list(both)
    kimi = least_work(replace(QWEN, per_channel=True), "fwd")
    assert kimi.flops == work.flops
    assert (kimi.bytes - work.bytes) / (32768 * 32) == 4 * 127  # g in float32


def test_work_counts_packed_chunks_and_states() -> None:
    packed = Case("packed", lengths=(1, 64, 65, 0), initial_state=False)
    dense = Case("dense", T=64, initial_state=False)
    assert least_work(packed, "fwd").flops == 4 * least_work(dense, "fwd").flops
    kept = Case("state", lengths=(1, 64, 65, 0))
    state = 4 * 2 * 64 * 64 * 4  # backward reads the initial state and writes its gradient
    more = [least_work(kept, w).bytes - least_work(packed, w).bytes for w in ("fwd", "bwd")]
    assert more == [state, 2 * state]
    empty = replace(kept, lengths=(0, 0, 0, 0))
    assert [least_work(empty, which).bytes for which in ("fwd", "bwd")] == [2 * state, 3 * state]


def test_work_of_a_step_is_mostly_states() -> None:
    step = StepCase("step", B=8, H=16, HV=32, K=128, V=128, dtype=torch.bfloat16)
    states = 2 * 8 * 32 * 128 * 128 * 4
    assert states < least_step_work(step).bytes < 1.01 * states


def test_relative_error() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(1), torch.zeros(1)) == 1
    assert math.isnan(relative_error(torch.tensor([3.0, torch.nan]), truth))


def test_wall_times_tell_slow_from_fast() -> None:
    runs = {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)}
    found = timing.wall_times(runs, torch.device("cpu"), budget=0.2)
    assert 20 <= found["slow"].ms < 200
    assert 2 <= found["fast"].ms < found["slow"].ms
    assert found["fast"].repeats > found["slow"].repeats >= 3
    more = found["slow"].less(found["fast"])
    assert 15 < more.ms < 200
    assert more.clock == "difference"


@pytest.mark.gpu
def test_gpu_times_agree_with_and_without_a_graph() -> None:
    x = torch.randn(2**26, device="cuda")
    y = torch.empty_like(x)
    runs = dict.fromkeys(("graph", "events"), lambda: torch.neg(x, out=y))
    found = timing.gpu_times(runs, {"graph": True, "events": False}, budget=0.2)
    assert found["graph"].clock == "graph"
    assert found["events"].clock == "events"
    assert 1 / 3 < found["graph"].ms / found["events"].ms < 3  # the GPU may be shared
    limits = ceilings(torch.device("cuda"), torch.bfloat16)
    assert 1 / 3 < limits.bytes / (2 * x.nbytes / found["graph"].ms * 1e3) < 3


@pytest.mark.gpu
def test_backward_alone_fits_in_a_graph() -> None:
    stream = timing.capture_stream(torch.cuda.current_device())
    x = torch.randn(2**24, device="cuda", requires_grad=True)
    with torch.cuda.stream(stream):
        y = x.sin()
    torch.cuda.synchronize()
    runs = {"back": lambda: torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)}
    assert timing.gpu_times(runs, {"back": True}, budget=0.1)["back"].clock == "graph"


def test_the_command_is_recorded_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--shapes", "16/32:1x8192|8x1024", "--benchmark-json=/some/where/a.json"]
    monkeypatch.setattr("sys.argv", ["/lib/pytest/__main__.py", *arguments])
    command = environment(torch.device("cpu"))["command"]
    assert command == "pytest --shapes '16/32:1x8192|8x1024' --benchmark-json=a.json"
