"""What kernels are given: static options that name a variant, and tensors as TMA takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.problem import Call


def dtype_name(x: Tensor | None, otherwise: str = "") -> str:
    """TileLang's name of a tensor's dtype, or what stands for a tensor that is not there."""
    return otherwise if x is None else str(x.dtype).removeprefix("torch.")


def gate_options(call: Call) -> dict[str, Any]:
    """What kernels that see the gates and the norms are built for."""
    return {
        "gates": dtype_name(call.g),
        "strengths": dtype_name(call.beta),
        "l2": call.use_qk_l2norm_in_kernel,
        "gate": call.use_gate_in_kernel,
        "bias": call.dt_bias is not None,
        "sigmoid": call.use_beta_sigmoid_in_kernel,
        "double": call.allow_neg_eigval,
    }


def tma_ready(x: Any) -> Any:
    """x, a tensor or None, or a copy as TMA wants it: contiguous, aligned to 16 bytes."""
    if x is None or (x.is_contiguous() and not x.data_ptr() % 16):
        return x
    return x.clone(memory_format=torch.contiguous_format)
