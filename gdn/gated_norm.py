"""The gated RMS norm of a layer: weight x / sqrt(mean x^2 + eps) act(gate), over the last
dimension, in float32. Triton's kernel runs it on a GPU, else PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn.parts import Choice, load, refuse_kernels

TRITON, TORCH = "triton", "torch"
_MODULE = "gdn.backends.triton.gated_norm"
_MOST = 8192
"""Columns that one program of the kernel holds."""


def choose(x: Tensor) -> Choice:
    """What runs `gated_rms_norm` on x."""
    if reason := refuse_kernels(x):
        return Choice(TORCH, (reason,))
    if x.shape[-1] > _MOST:
        return Choice(TORCH, (f"the kernel takes {_MOST} columns at most, not {x.shape[-1]}",))
    if load("triton") is None or load(_MODULE) is None:
        return Choice(TORCH, ("triton is not installed",))
    return Choice(TRITON)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str = "silu"
) -> Tensor:
    """Normalise x and multiply it by the activated gate. Differentiable in x, gate and weight.

    Args:
        x, gate: [..., heads, V], any floating dtype. On a GPU rows are read where they lie.
        weight: [V].
        eps: added to the mean of squares.
        activation: "silu" or "sigmoid".

    Returns:
        y in x's dtype and shape.
    """
    if choose(x).engine == TRITON:
        module: Any = load(_MODULE)
        y: Tensor = module.gated_norm(x, gate, weight, eps, activation == "sigmoid")
        return y
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    opened: Tensor = getattr(F, activation)(gate.to(wide.dtype))
    return (weight * wide.to(x.dtype) * opened).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """y = weight x / sqrt(mean x^2 + eps) * silu(gate), over the last dimension; the norm and the
    gate in float32."""

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)
