"""q, k, v, g and beta by their strides in TileLang's kernels: memory rounds in the emulator, and
what is copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tilelang")
emulated = pytest.importorskip("test_tilelang_emulated")

import test_strided_inputs  # noqa: E402
from gdn.backends.tilelang.arguments import token_ready  # noqa: E402
from test_tilelang_emulated import GROUPED, folder, world  # noqa: E402, F401


def test_batches_in_memory_rounds(
    world: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world(late=False)
    monkeypatch.setattr(emulated.rounds, "MIN_ROUND_BYTES", 1)
    monkeypatch.setattr(emulated.rounds, "sm_count", lambda device: 3)
    case = replace(GROUPED, B=2, T=190)
    test_strided_inputs.test_strides_do_not_matter(
        "emulated", "cpu", torch.bfloat16, case, test_strided_inputs.shortened
    )


def rows(*strides: int, offset: int = 0) -> torch.Tensor:
    return torch.zeros(1 << 16).bfloat16().as_strided((1, 9, 2, 64), strides, offset)


@pytest.mark.parametrize(
    ("x", "read"),
    [
        (rows(1152, 128, 64, 1), True),
        (rows(0, 384, 64, 1), False),  # TMA has no stride 0
        (rows(9216, 1024, 0, 1), False),
        (rows(9216, 1024, 64, 1, offset=4), False),
        (rows(9216, 1020, 64, 1), False),
        (rows(9216, 1024, 1, 16), False),
        (rows(3, 384, 64, 1), False),  # contiguous for PyTorch if T were 1
    ],
)
def test_what_tma_cannot_read_is_copied(x: torch.Tensor, read: bool) -> None:
    ready = token_ready(x)
    assert (ready is x) is read
    assert torch.equal(ready, x)
    assert read or ready.stride() == (1152, 128, 64, 1)
