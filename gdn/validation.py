"""What a call must look like: every argument checked from metadata, each error with its remedy."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from gdn.problem import Call

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _require(ok: bool, message: Callable[[], str]) -> None:
    if not ok:
        raise ValueError(message())


def _require_shape(name: str, x: Tensor, form: str, shape: tuple[int, ...], hint: str = "") -> None:
    if _shape(x) != shape:
        raise ValueError(f"{name} must be {form} = {shape}, got {_shape(x)}{hint}")


def validate(call: Call) -> None:
    """Raise ValueError unless the call is well-formed; from metadata alone, without a device sync.

    The values of cu_seqlens are `check_cu_seqlens`'s part.
    """
    q, k, v = call.q, call.k, call.v
    for name, x, form in (
        ("q", q, "[B, T, H, K]"),
        ("k", k, "[B, T, H, K]"),
        ("v", v, "[B, T, HV, V]"),
    ):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be {form} (4 dimensions), got {_shape(x)}; tokens come before heads"
            )
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; "
                "cast it with .to(torch.bfloat16)"
            )
    B, T, H, K = _shape(q)
    HV, V = _shape(v)[2:]
    _require_shape("k", k, "[B, T, H, K]", (B, T, H, K), " (q's shape)")
    _require_shape("v", v, "[B, T, HV, V]", (B, T, HV, V), "; B and T are q's")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(
            f"q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
        )
    if min(H, K, HV, V) < 1 or HV % H:
        raise ValueError(
            f"HV must be a multiple of H, and H, K, V at least 1, got H = {H}, HV = {HV}, "
            f"K = {K}, V = {V}; "
            "q and k hold the fewer heads under grouped value attention"
        )
    _require_shape("g", call.g, "[B, T, HV]", (B, T, HV))
    _require_shape("beta", call.beta, "[B, T, HV]", (B, T, HV))
    _validate_options(call)
    _validate_cu_seqlens(call)
    if call.initial_state is not None:
        _validate_state(call)
    for name in ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias"):
        x = getattr(call, name)
        if x is not None and not x.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a floating-point tensor, got {x.dtype}; cast it with .float()"
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
    _require(
        math.isfinite(call.scale),
        lambda: f"scale must be finite, got {call.scale}; leave it out for K^-0.5",
    )
    HV = call.v.shape[2]
    for name, x in (("A_log", call.A_log), ("dt_bias", call.dt_bias)):
        if x is None:
            continue
        _require(
            call.use_gate_in_kernel,
            lambda name=name: (
                f"{name} must come with use_gate_in_kernel=True, got False; "  # type: ignore[misc]
                "g is taken as the finished log decay otherwise"
            ),
        )
        _require_shape(name, x, "[HV]", (HV,))
    _require(
        not call.use_gate_in_kernel or call.A_log is not None,
        lambda: "A_log must be given with use_gate_in_kernel=True, got None; pass the layer's",
    )
    _require(
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
                f"{name} must be int32 or int64 [N + 1], got {x.dtype} {_shape(x)}; "
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
        _require_shape(
            "cu_seqlens_cpu", call.cu_seqlens_cpu, "cu_seqlens' shape", _shape(call.cu_seqlens)
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
                f"{_shape(indices)}; "
                "leave it out to have it computed"
            )


def _validate_state(call: Call) -> None:
    assert call.initial_state is not None
    form = "[N, HV, V, K]" if call.state_v_first else "[N, HV, K, V]"
    shape, got = call.state_shape, _shape(call.initial_state)
    hint = ""
    if got != shape and got == (*shape[:2], shape[3], shape[2]):
        hint = f"; that is the other layout, pass state_v_first={not call.state_v_first}"
    _require_shape("initial_state", call.initial_state, form, shape, hint)


_checked: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}


def check_cu_seqlens(call: Call) -> None:
    """Check that cu_seqlens starts at 0, never descends and ends at T.

    On the CPU (or given cu_seqlens_cpu) at every call, with a ValueError. On a GPU without a device
    sync: an asynchronous device-side assertion, queued once for a tensor that has not changed since
    (layers of one model share theirs), so that the error surfaces at the next synchronisation.
    """
    cu_seqlens, T = call.cu_seqlens, call.q.shape[1]
    if cu_seqlens is None or cu_seqlens.device.type == "meta":
        return
    host = cu_seqlens if cu_seqlens.device.type == "cpu" else call.cu_seqlens_cpu
    if host is not None:
        bounds = host.tolist()
        name = "cu_seqlens" if host is cu_seqlens else "cu_seqlens_cpu"
        if bounds[0] != 0:
            raise ValueError(
                f"{name} must start at 0, got {bounds[0]}; prefix the cumulative lengths with 0"
            )
        for n, (start, end) in enumerate(itertools.pairwise(bounds)):
            if end < start:
                raise ValueError(
                    f"{name} must not descend, got {start} then {end} at {n} and {n + 1}; "
                    "it holds cumulative lengths, cumsum the lengths first"
                )
        if bounds[-1] != T:
            raise ValueError(
                f"{name} must end at T = {T}, got {bounds[-1]}; "
                "drop the padding tokens or count them in"
            )
        return
    key = id(cu_seqlens)
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    seen = _checked.get(key)
    if seen is not None and seen[0]() is cu_seqlens and seen[1:] == (version, T):
        return
    ok = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (cu_seqlens.diff() >= 0).all()
    torch._assert_async(ok, f"cu_seqlens must start at 0, never descend and end at T = {T}")
    _checked[key] = (weakref.ref(cu_seqlens, lambda _: _checked.pop(key, None)), version, T)
