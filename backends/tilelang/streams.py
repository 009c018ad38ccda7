"""The second stream of a device: kernels that run beside others."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """What is launched in this context follows what has been launched and runs beside what will be,
    up to `rejoin`; it comes first where both want a multiprocessor. There is one other stream a
    device: calls on several streams wait for each other in it, and while one is captured in a CUDA
    graph no other thread may call there."""
    aside = _aside(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        yield


def join_side_stream(device: torch.device) -> None:
    torch.cuda.current_stream(device).wait_stream(_aside(device))
