"""Memory for what a kernel backend writes, with little work on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def allocator(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """What returns a new uninitialised contiguous tensor at each call, `device` being current.

    PyTorch's compiled code allocates like this: it takes a third of the time of `torch.empty`.
    """
    empty = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if empty is None:
        return functools.partial(torch.empty, shape, dtype=dtype, device=device)
    strides = torch.empty(shape, device="meta").stride()
    return functools.partial(empty, tuple(shape), strides, dtype)
