"""Arguments of kernels: static options that select a variant, and tensors that TMA can read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.problem import Call

from .kernels import Job, first_channel_chunks, first_chunks


def dtype_name(x: Tensor | None, otherwise: str = "") -> str:
    """TileLang's name of a tensor's dtype; `otherwise` if there is no tensor."""
    return otherwise if x is None else str(x.dtype).removeprefix("torch.")


def gate_options(call: Call) -> dict[str, Any]:
    """The static options of kernels that compute gates or norms."""
    return {
        "gates": dtype_name(call.g),
        "strengths": dtype_name(call.beta),
        "l2": call.use_qk_l2norm_in_kernel,
        "gate": call.use_gate_in_kernel,
        "bias": call.dt_bias is not None,
        "sigmoid": call.use_beta_sigmoid_in_kernel,
        "double": call.allow_neg_eigval,
    }


def channel_options(call: Call) -> dict[str, Any]:
    """Those of a decay per channel."""
    return {"A_log": call.A_log is not None, "lower_bound": lower_bound(call)}


def search_job(call: Call, reverse: bool) -> Job:
    """The kernel that finds what a first scan may leave out."""
    options = gate_options(call) | {
        "dtype": dtype_name(call.q), "K": call.q.shape[3],
        "varlen": call.cu_seqlens is not None, "offsets": dtype_name(call.cu_seqlens, "int32"),
        "reverse": reverse,
    }  # fmt: skip
    if call.per_channel:
        return first_channel_chunks, options | channel_options(call)
    return first_chunks, options


def lower_bound(call: Call) -> float | None:
    """The gate's: -5 and -5.0 are one option."""
    return None if call.gate_lower_bound is None else float(call.gate_lower_bound)


def clear_tail_options(call: Call, backward: bool) -> dict[str, Any]:
    """The static options of `clear_tail` for a call."""
    return {
        "dtype": dtype_name(call.q), "K": call.q.shape[3], "V": call.v.shape[3],
        "gates": dtype_name(call.g), "strengths": dtype_name(call.beta),
        "offsets": dtype_name(call.cu_seqlens), "backward": backward,
        "counter": False,
    }  # fmt: skip


def token_ready(x: Tensor) -> Tensor:
    """q, k, v, or g or beta of a head, if kernels can read them by their strides, else a copy: the
    last stride must be 1. TMA, which reads q, k and v, needs an address and other strides that are
    multiples of 16 bytes and not 0; a new tensor has them, also in dimensions of size 1. Numbers of
    g and beta of a sequence are counted in 32 bits."""
    row, token, *heads, last = x.stride()
    if heads:
        beside = (row | token | heads[0]) * x.element_size() | x.data_ptr()
        readable = row != 0 and token != 0 and heads[0] != 0 and not beside % 16
    else:
        readable = x.shape[1] * token < 2**31
    if readable and last == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def tma_ready(x: Any) -> Any:
    """x if TMA can read it (contiguous, aligned to 16 bytes) or x is None, else a copy of x."""
    if x is None or (x.is_contiguous() and not x.data_ptr() % 16):
        return x
    return x.clone(memory_format=torch.contiguous_format)
