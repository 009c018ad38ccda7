"""Checks of arguments from metadata alone: shapes, dtypes, devices and options."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gdn.problem import DIFFERENTIABLE, Call

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(x: Tensor) -> tuple[int, ...]:
    """x's shape, as error messages show it."""
    return tuple(x.shape)


def require(ok: bool, message: Callable[[], str]) -> None:
    """ValueError with the message unless ok."""
    if not ok:
        raise ValueError(message())


def require_shape(name: str, x: Tensor, form: str, shape: tuple[int, ...], hint: str = "") -> None:
    """ValueError unless x has this shape; form names its dimensions."""
    if shape_of(x) != shape:
        raise ValueError(f"{name} must be {form} = {shape}, got {shape_of(x)}{hint}")


def validate(call: Call) -> None:
    """Raise ValueError unless the call is well-formed; from metadata alone, without a device sync.

    `gdn.validation.values` checks the values of index tensors.
    """
    q, k, v = call.q, call.k, call.v
    for name, x, form in (
        ("q", q, "[B, T, H, K]"),
        ("k", k, "[B, T, H, K]"),
        ("v", v, "[B, T, HV, V]"),
    ):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be {form} (4 dimensions), got {shape_of(x)}; tokens come before heads"
            )
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; "
                "cast it with .to(torch.bfloat16)"
            )
    B, T, H, K = shape_of(q)
    HV, V = shape_of(v)[2:]
    require_shape("k", k, "[B, T, H, K]", (B, T, H, K), " (q's shape)")
    require_shape("v", v, "[B, T, HV, V]", (B, T, HV, V), "; B and T are q's")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(
            f"q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
        )
    if min(H, K, HV, V) < 1 or HV % H:
        raise ValueError(
            f"HV must be a multiple of H, and H, K, V at least 1, got H = {H}, HV = {HV}, "
            f"K = {K}, V = {V}; "
            "q and k have H heads, v has HV"
        )
    if call.per_channel:
        hint = "; give g one dimension less for a decay per head"
        require_shape("g", call.g, "[B, T, HV, K]", (B, T, HV, K), hint)
    else:
        require_shape("g", call.g, "[B, T, HV]", (B, T, HV), ", or [B, T, HV, K] per channel")
    require_shape("beta", call.beta, "[B, T, HV]", (B, T, HV))
    _validate_options(call)
    _validate_cu_seqlens(call)
    if call.initial_state is not None:
        require_state(
            "initial_state", call.initial_state, "N", call.state_shape, call.state_v_first
        )
    for name, tensor in zip(DIFFERENTIABLE, call.differentiable, strict=True):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a floating-point tensor, got {tensor.dtype}; cast it with .float()"
            )
    for name in (
        "k",
        "v",
        "g",
        "beta",
        "initial_state",
        "A_log",
        "dt_bias",
        "cu_seqlens",
        "chunk_indices",
    ):
        x = getattr(call, name)
        if x is not None and x.device != q.device:
            raise ValueError(
                f"{name} must be on q's device {q.device}, got {x.device}; use .to(q.device)"
            )


def _validate_options(call: Call) -> None:
    require(
        math.isfinite(call.scale),
        lambda: f"scale must be finite, got {call.scale}; leave it out for K^-0.5",
    )
    HV, K, bound = call.v.shape[2], call.q.shape[3], call.gate_lower_bound
    bias = ("[HV, K]", (HV, K)) if call.per_channel else ("[HV]", (HV,))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"A_log": ("[HV]", (HV,)), "dt_bias": bias}
    for name, shape in shapes.items():
        x = getattr(call, name)
        if x is None:
            continue
        require(
            call.use_gate_in_kernel,
            lambda name=name: (
                f"{name} must come with use_gate_in_kernel=True, got False; "  # type: ignore[misc]
                "without it g is the finished log decay"
            ),
        )
        require_shape(name, x, *shape)
    require(
        not call.use_gate_in_kernel or call.A_log is not None or bound is not None,
        lambda: "A_log must be given with use_gate_in_kernel=True, got None; pass A_log [HV]",
    )
    require(
        bound is None or call.use_gate_in_kernel,
        lambda: (
            "gate_lower_bound must come with use_gate_in_kernel=True, got False; "
            "without it g is the finished log decay"
        ),
    )
    require(
        bound is None or -math.inf < bound < 0,
        lambda: f"gate_lower_bound must be finite and below 0, got {bound}; models use -5",
    )
    require(
        not call.allow_neg_eigval or call.use_beta_sigmoid_in_kernel,
        lambda: (
            "allow_neg_eigval must come with use_beta_sigmoid_in_kernel=True, got False; "
            "for a finished beta, multiply it by 2 yourself"
        ),
    )


def _validate_cu_seqlens(call: Call) -> None:
    B = call.q.shape[0]
    for name, x in (("cu_seqlens", call.cu_seqlens), ("cu_seqlens_cpu", call.cu_seqlens_cpu)):
        if x is None:
            continue
        if x.dim() != 1 or x.shape[0] < 1 or x.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must be int32 or int64 [N + 1], got {x.dtype} {shape_of(x)}; "
                "prefix the cumulative lengths with 0"
            )
    if call.cu_seqlens is not None and B != 1:
        raise ValueError(
            f"q must have B = 1 with cu_seqlens, got B = {B}; pack the sequences along T, "
            "for example with x.flatten(0, 1).unsqueeze(0)"
        )
    if call.cu_seqlens_cpu is not None:
        if call.cu_seqlens is None:
            raise ValueError("cu_seqlens_cpu must come with cu_seqlens, got None; pass both")
        if call.cu_seqlens_cpu.device.type != "cpu" and call.q.device.type != "meta":
            raise ValueError(
                f"cu_seqlens_cpu must be on the CPU, got {call.cu_seqlens_cpu.device}; "
                "it is cu_seqlens.cpu()"
            )
        require_shape(
            "cu_seqlens_cpu", call.cu_seqlens_cpu, "cu_seqlens' shape", shape_of(call.cu_seqlens)
        )
    indices = call.chunk_indices
    if indices is not None:
        if call.cu_seqlens is None:
            raise ValueError(
                "chunk_indices must come with cu_seqlens, got None; leave it out for dense input"
            )
        if (
            indices.dim() != 2
            or indices.shape[1] != 2
            or indices.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(
                f"chunk_indices must be int32 or int64 [chunks, 2], got {indices.dtype} "
                f"{shape_of(indices)}; "
                "leave it out to have it computed"
            )


def require_state(
    name: str, state: Tensor, rows: str, shape: tuple[int, ...], v_first: bool
) -> None:
    """ValueError unless states have this shape, with a hint if it is the other layout."""
    got, hint = shape_of(state), ""
    if got != shape and got == (*shape[:2], shape[3], shape[2]):
        hint = f"; that is the other layout, pass state_v_first={not v_first}"
    form = f"[{rows}, HV, V, K]" if v_first else f"[{rows}, HV, K, V]"
    require_shape(name, state, form, shape, hint)
