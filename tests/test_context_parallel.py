"""Context parallelism over gloo, and over NCCL where there are two GPUs: sequences split over
processes give the results and gradients of the whole sequences."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_ranks import replay_agrees
from compiled_ranks import compile_agrees
from context_parallel_ranks import Parallel, run_cases, run_in_pieces
from processes import LIMIT, fail_alone, start
from sharded_heads_ranks import run_all

from gdn.testing import Case

FUSED = {"fused": True, "allow_neg_eigval": True}
CASES = [
    Parallel("even", (64, 64)),
    Parallel("uneven", (70, 1)),
    Parallel("nothing first", (0, 40)),
    Parallel("fused, V first", (33, 40), options={**FUSED, "state_v_first": True}),
    Parallel("packed", (50, 30, 45), (20, 10, 60, 1, 30, 4), options={"HV": 4, "H": 2}),
    Parallel("an empty rank", (40, 0, 40), (10, 55, 15), silent=True),
    Parallel("on the cuts", (30, 20, 10), (30, 20, 10)),
    Parallel("empty sequences", (30, 20, 10), (0, 30, 0, 0, 25, 0, 5, 0)),
    Parallel("no state", (30, 80, 20), (100, 30), options={"initial_state": False}),
    Parallel("no final state", (21, 30, 20), (5, 66), final_state=False),
    Parallel("no tokens", (0, 0, 0), (0, 0)),
    Parallel("channels", (30, 34, 20), (10, 60, 14), options={"per_channel": True, **FUSED}),
    Parallel("one sequence", (17, 65, 30, 9), options={"gates": "weak"}, silent=True),
    Parallel("resets", (30, 30, 30, 30), (110, 10), options={"gates": "resets"}),
    Parallel("nothing last", (20, 30, 0, 0), (45, 5, 0)),
    Parallel("shorter than a halo", (5, 1, 1, 8), (3, 10, 2)),
    Parallel("zigzag, short", (3, 1, 2, 9), (2, 13), "zigzag"),
    Parallel("zigzag", (30, 31), layout="zigzag"),
    Parallel("zigzag, packed", (30, 0, 41), (30, 10, 31, 0), "zigzag", {"per_channel": True}),
    Parallel("zigzag, four", (20, 24, 28, 32), (7, 90, 7), "zigzag", FUSED, silent=True),
    Parallel("zigzag, one", (32, 32, 32, 32), None, "zigzag", {"gates": "weak"}),
]
LONG: dict[str, Any] = {"HV": 4, "H": 2, "K": 128, "V": 128, "gates": "weak"}
NORM = LONG | {"l2norm": True}
ON_GPUS = {  # most cases of a group share kernels
    "dense": [
        Parallel("one sequence", (1100, 1000), options=LONG),
        Parallel("forgetting", (1100, 1000), options=LONG | {"gates": "fast"}),
    ],
    "packed": [
        Parallel("packed", (900, 1000), (100, 5, 1500, 0, 290, 5), options=NORM),
        Parallel("zigzag", (1500, 1600), (3000, 100), "zigzag", options=NORM),
    ],
    "others": [
        Parallel("fused", (700, 830), options=LONG | FUSED | {"state_v_first": True}),
        Parallel("no states", (0, 700), final_state=False, options=LONG | {"initial_state": False}),
        Parallel("blocks of heads", (300, 280), options=NORM | {"K": 96, "V": 192}),
        Parallel("channels", (700, 600), options=LONG | {"per_channel": True}),
    ],
    "four GPUs": [
        Parallel("four", (600, 700, 500, 300), options=LONG),
        Parallel("four, packed", (400, 600, 500, 600), (30, 900, 70, 1100), options=NORM),
        Parallel("four, zigzag", (600, 700, 500, 300), None, "zigzag", options=LONG),
    ],
}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tilelang", "triton"])
@pytest.mark.parametrize("group", ON_GPUS)
def test_gpus_agree_with_the_whole_sequences(tmp_path: Path, group: str, backend: str) -> None:
    """NCCL, a GPU for each rank."""
    cases = ON_GPUS[group]
    ranks = cases[0].ranks
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    start(run_cases, ranks, tmp_path, 300, cases, (torch.bfloat16,), backend, "cuda", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tilelang", "triton"])
def test_a_captured_call_replays_with_other_inputs(tmp_path: Path, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = Case("captured", HV=4, H=2, K=128, V=128, dtype=torch.bfloat16, gates="weak")
    start(replay_agrees, 2, tmp_path, 300, case, (1100, 1000), backend, device="cuda")


def test_every_rank_agrees_with_the_whole_sequences(tmp_path: Path) -> None:
    """All cases, then heads in shards (DTensor), then DDP and FSDP2, in processes that start once;
    a rank that fails names its case."""
    start(run_all, 4, tmp_path, 240, CASES, (torch.float64, torch.float32))


def test_triton_agrees_in_its_interpreter(tmp_path: Path) -> None:
    """By further calls, for the small sizes, and by an exchange between its scans."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("not interpreted")  # gloo, and tensors of the CPU
    small: dict[str, Any] = {"HV": 1, "K": 16, "V": 16, "fused": True}
    cut = small | {"K": 64, "V": 64, "gates": "weak"}
    cases = [
        Parallel("triton", (4, 3), (7,), options=small),
        Parallel("pieces", (40, 140), None, "zigzag", options=cut),  # the inner parts have two
    ]
    start(run_in_pieces, 2, tmp_path, 240, cases, (torch.float32,), "triton")


def test_torch_compile_makes_one_graph(tmp_path: Path) -> None:
    start(compile_agrees, 2, tmp_path, 120)


def test_a_failing_rank_ends_all_with_its_message(tmp_path: Path) -> None:
    """The other one, which waits for it, does not hang until the time-out of the collectives. A
    rank that calls the op alone gets an error when the time-out of its group is over."""
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="T_local = 8 tokens on rank 1 of this"):
        start(fail_alone, 2, tmp_path, LIMIT / 2)
    assert time.monotonic() - begin < LIMIT / 2
