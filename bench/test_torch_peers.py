"""The torch backend beside the other two plain-PyTorch implementations that people run on a CPU, in
time and in peak memory, in one run. On a GPU there is nothing to see here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import peers
import pytest
import torch

from gdn.compare import PASSES, truth
from gdn.testing import TOLERANCE, relative_error

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares CPU implementations")
CHECKED = 200


@functools.cache
def expected() -> dict[str, torch.Tensor]:
    return truth(replace(peers.CASE, T=CHECKED), torch.device("cpu"))


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("T", [512, 2048, 8192])
def test_plain_pytorch(record: Callable[..., None], peer: str, T: int, which: str) -> None:
    needed = {"fla naive": ("fla", "einops"), "transformers": ("transformers",)}
    for package in needed.get(peer, ()):
        pytest.importorskip(package)
    backward = which == PASSES[1]
    (o, state), found = peers.make_run(peer, CHECKED, backward=True)()
    for name, value in ({"o": o, "final_state": state} | found).items():
        error = relative_error(value.detach(), expected()[name])
        assert error <= TOLERANCE[torch.float32], name
    peak = peers.peak_memory(peer, T, backward)
    run = peers.make_run(peer, T, backward)
    record(
        run, 3 if T == 8192 else 7, T=T, **{"pass": which}, implementation=peer,
        **{"peak MB": f"{peak / 1e6:.0f}"},
    )  # fmt: skip
