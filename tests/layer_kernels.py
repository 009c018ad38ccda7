"""The kernels of a layer's parts on machines without a GPU: Triton's interpreter runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gdn import convolution, gated_norm


@pytest.fixture
def fla_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fla's module of the convolution. Without a GPU each kernel has the first of its
    configurations, since the interpreter times none."""
    pytest.importorskip("triton", reason="triton is not installed")
    module = convolution.load("fla.modules.causal_conv1d.ops")
    if module is None:
        pytest.skip("fla is not installed")
    if not torch.cuda.is_available():
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and hasattr(kernel.fn, "configs"):
                monkeypatch.setattr(kernel.fn, "configs", kernel.fn.configs[:1])
    return module


def choose_kernels(monkeypatch: pytest.MonkeyPatch, convolution_by: str = convolution.FLA) -> None:
    """Let kernels run the parts on any device, and the convolution by this engine alone."""
    for module in (convolution, gated_norm):
        monkeypatch.setattr(module, "refuse_kernels", lambda x: None)
    load = convolution.load
    hidden = {name for engine, name in convolution._MODULES.items() if engine != convolution_by}
    monkeypatch.setattr(convolution, "load", lambda name: None if name in hidden else load(name))
