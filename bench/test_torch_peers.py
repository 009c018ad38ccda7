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
CHECKED = 200


@functools.cache
def expected() -> dict[str, torch.Tensor]:
    case = replace(peers.CASE, T=CHECKED)
    return agreement.by_definition(agreement.make(case, torch.device("cpu")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    lengths = {"quick": [512], "default": [512, 2048], "full": [512, 2048, 8192]}
    metafunc.parametrize("T", lengths[size(metafunc.config)])


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("which", ["fwd", "fwd+bwd"])
def test_plain_pytorch(record: Callable[..., None], peer: str, T: int, which: str) -> None:
    needed = {"fla naive": ("fla", "einops"), "transformers": ("transformers",)}
    for package in needed.get(peer, ()):
        pytest.importorskip(package)
    (o, state), found = peers.make_run(peer, CHECKED, backward=True)()
    for name, value in ({"o": o, "final_state": state} | found).items():
        error = relative_error(value.detach(), expected()[name])
        assert error <= TOLERANCE[torch.float32], name
    peak = peers.peak_memory(peer, T, which == "fwd+bwd")
    run = peers.make_run(peer, T, which == "fwd+bwd")
    columns = {"kind": "plain PyTorch", "T": T, "pass": which, "implementation": peer}
    record(run, shape=f"T={T}", peak_mb=peak / 1e6, **columns)
