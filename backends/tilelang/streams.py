"""The second stream of a device, for kernels that run beside others."""

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
    """Launch kernels on the second stream, which has priority where both streams want an SM.

    They start after all that was launched before, and run beside what is launched after, up to
    `join_side_stream`. There is one second stream a device. Calls on several streams therefore wait
    for each other in it; and while a CUDA graph captures one call, no other thread may call there.
    """
    aside = _aside(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        yield


def join_side_stream(device: torch.device) -> None:
    """Let the current stream wait for the second one."""
    torch.cuda.current_stream(device).wait_stream(_aside(device))
