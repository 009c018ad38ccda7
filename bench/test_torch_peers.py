"""The torch backend beside two other plain-PyTorch implementations on a CPU: time and peak memory.
Skipped on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import peers
import pytest
import torch
from suite import size

from gdn.testing import TOLERANCE, agreement, relative_error

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares CPU implementations")
CHECKED = 192  # fla's naive_chunk_kda takes whole chunks only


@functools.cache
def expected(decay: str) -> dict[str, torch.Tensor]:
    case = replace(peers.CASES[decay], T=CHECKED)
    return agreement.by_definition(agreement.make(case, torch.device("cpu")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    lengths = {"quick": [512], "default": [512, 2048], "full": [512, 2048, 8192]}
    metafunc.parametrize("T", lengths[size(metafunc.config)])


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("which", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("decay", peers.CASES)
def test_plain_pytorch(
    record: Callable[..., None], peer: str, T: int, which: str, decay: str
) -> None:
    needed = {"fla naive": ("fla", "einops"), "transformers": ("transformers",)}
    for package in needed.get(peer, ()):
        pytest.importorskip(package)
    (o, state), found = peers.make_run(peer, CHECKED, True, decay)()
    for name, value in ({"o": o, "final_state": state} | found).items():
        error = relative_error(value.detach(), expected(decay)[name])
        assert error <= TOLERANCE[torch.float32], name
    peak = peers.peak_memory(peer, T, which == "fwd+bwd", decay)
    run = peers.make_run(peer, T, which == "fwd+bwd", decay)
    columns = {"kind": "plain PyTorch", "T": T, "pass": which, "implementation": peer}
    columns |= {"decay": f"per {decay}"}
    record(run, shape=f"T={T}", peak_mb=peak / 1e6, **columns)
