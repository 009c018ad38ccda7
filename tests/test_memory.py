"""`gdn.backends.common.allocation`: its tensors are like those of `torch.empty`."""

from __future__ import annotations

import pytest
import torch
from gdn.backends.common.allocation import allocator


@pytest.mark.parametrize("shape", [(2, 3, 5), torch.Size((4, 1)), (0, 3, 2), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_allocates_like_empty(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, inference: bool
) -> None:
    expected = torch.empty(shape, dtype=dtype, device=device)
    new = allocator(shape, dtype, expected.device)
    with torch.inference_mode(inference):
        x, y = new(), new()
    assert (x.shape, x.stride(), x.dtype) == (expected.shape, expected.stride(), dtype)
    assert x.device == expected.device
    assert x.is_inference() == inference
    assert not x.numel() or x.data_ptr() != y.data_ptr()
    assert x.data_ptr() % 16 == 0


def test_allocates_on_devices_without_a_fast_call() -> None:
    assert allocator((2, 3), torch.float16, torch.device("meta"))().is_meta
