"""Makes a `Call`, a `Step` or a `Prefill` from the arguments of the public functions."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypedDict

import torch
from torch import Tensor

from gdn.context_parallel import ContextParallel
from gdn.invariance import is_batch_invariant
from gdn.problem import Call, PoolCall, Prefill, Step
from gdn.validation import check_types, no_tensor, refuse_negated


class Options(TypedDict, total=False):
    """Every keyword except backend of `gdn.gated_delta_net`, `gdn.gated_delta_net_decode` and
    `gdn.gated_delta_net_prefill`, for functions that take the arguments of any of them. With state=
    the call is a decode step, or a prefill on the pool."""

    state: Tensor
    state_indices: Tensor | None
    null_index: int
    num_accepted_tokens: Tensor | None
    out: Tensor | None
    output_states: Tensor | None
    output_indices: Tensor | None
    leading_column: bool
    fresh: Tensor | None
    checkpoint_offsets: Tensor | None
    checkpoint_indices: Tensor | None
    checkpoints: Tensor | None
    scale: float | None
    gate_lower_bound: float | None
    initial_state: Tensor | None
    output_final_state: bool
    use_qk_l2norm_in_kernel: bool
    use_gate_in_kernel: bool
    A_log: Tensor | None
    dt_bias: Tensor | None
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    state_v_first: bool
    cu_seqlens: Tensor | None
    cu_seqlens_cpu: Tensor | None
    chunk_indices: Tensor | None
    transpose_state_layout: bool | None
    cp: ContextParallel | None


def make(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    options: dict[str, Any],
    prefill: bool,
) -> Call | PoolCall:
    """The Call that `gated_delta_net` makes from these arguments, or with state= the Step that
    `gated_delta_net_decode` makes, or with prefill the Prefill of `gated_delta_net_prefill`."""
    options = dict(options)
    q, k, v, scale = prepare(q, k, v, beta, options.pop("scale", None))
    g, dt_bias = prepare_gate(
        v, g, options.get("dt_bias"), options.get("use_gate_in_kernel", False)
    )
    if "dt_bias" in options:
        options["dt_bias"] = dt_bias
    transposed = options.pop("transpose_state_layout", None)
    if transposed is not None:
        given = options.get("state_v_first", False)
        options["state_v_first"] = from_former_name(transposed, given, stacklevel=4)
    mode: dict[str, Any] = {"batch_invariant": is_batch_invariant()}
    made: Call | PoolCall
    kind: type[PoolCall] = Prefill if prefill else Step
    if "state" in options or kind is Prefill:
        own = {name: options.pop(name) for name in kind._fields if name in options}
        require_pool(own.get("state"))
        _refuse_pool_options(options, f"prefill={not prefill}", prefill)
        made = kind(Call(q, k, v, g, beta, scale=scale, **options, **mode), **own)
        refuse_negated(made)
    else:
        _refuse_pool_options(options, "state", None)
        made = Call(q, k, v, g, beta, scale=scale, **options, **mode)
    check_types(made)
    return made


def _refuse_pool_options(options: dict[str, Any], missing: str, got: object) -> None:
    """ValueError if an option of a call on a pool is left, which belongs to another kind."""
    for name in options:
        if name in (*Step._fields[1:], *Prefill._fields[1:]):
            raise ValueError(
                f"{name} must come with {missing}, got {got}; other calls have no such option"
            )


def full_signature(function: Any, *ops: Any) -> inspect.Signature:
    """The signature of a function that takes `Options`, with the keywords of the ops written
    out."""
    own = inspect.signature(function).parameters.values()
    keywords = [p for p in own if p.kind is not p.VAR_KEYWORD]
    names = {p.name for p in keywords}
    for op in ops:
        for parameter in inspect.signature(op).parameters.values():
            if parameter.name not in names:
                names.add(parameter.name)
                keywords.append(
                    parameter.replace(
                        default=None if parameter.name == "state" else parameter.default
                    )
                )
    return inspect.signature(function).replace(parameters=keywords)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Cast q, k, v to autocast's dtype, if it is on, and q, k to v's; fill in the default scale."""
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta)):
        if not isinstance(x, Tensor):
            raise no_tensor(name, x)
    if scale is None:
        K = q.shape[-1] if q.dim() else 0
        scale = K**-0.5 if K else 1.0
    if autocasts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (
            x.to(dtype) if x.dtype.is_floating_point and x.dtype != torch.float64 else x
            for x in (q, k, v)
        )
    if (q.dtype != v.dtype or k.dtype != v.dtype) and v.dtype.is_floating_point:
        q, k = (x.to(v.dtype) if x.dtype.is_floating_point else x for x in (q, k))
    return q, k, v, scale


def prepare_gate(
    v: Tensor, g: Tensor | None, dt_bias: Tensor | None, fused: bool
) -> tuple[Tensor, Tensor | None]:
    """Zeros [B, T, HV] in place of a g that is None, and a flat dt_bias [HV K] as [HV, K] where g
    has channels. ValueError if g is None with a fused gate."""
    if g is None:
        if fused:
            raise ValueError(
                "g must be given with use_gate_in_kernel=True, got None; "
                "leave the options of the gate out for no decay"
            )
        exact = torch.float64 if v.dtype == torch.float64 else torch.float32
        if hasattr(v, "device_mesh"):  # a DTensor: zeros in shards as v's
            return torch.zeros_like(v[..., 0], dtype=exact), dt_bias
        return v.new_zeros(v.shape[:3], dtype=exact), dt_bias
    if not isinstance(g, Tensor):
        raise no_tensor("g", g, "or None for no decay")
    if g.dim() == 4 and isinstance(dt_bias, Tensor) and dt_bias.dim() == 1:
        channels = g.shape[2:]
        if dt_bias.shape[0] == channels[0] * channels[1]:
            dt_bias = dt_bias.reshape(channels)
    return g, dt_bias


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device. Some devices, such as meta, have no autocast."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def require_pool(state: object) -> None:
    """TypeError unless the pool is a tensor."""
    if not isinstance(state, Tensor):
        raise no_tensor("state", state, "pass the pool")


def from_former_name(transposed: bool, state_v_first: bool, stacklevel: int = 3) -> bool:
    """state_v_first from its former name, transpose_state_layout; with a DeprecationWarning."""
    if state_v_first:
        raise ValueError(
            "state_v_first must come without transpose_state_layout, got both; "
            "drop the latter, which is its former name"
        )
    if not torch.compiler.is_compiling():  # Dynamo cannot trace a warning
        warnings.warn(
            "transpose_state_layout is fla's former name of state_v_first; pass that instead",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
    return transposed


def needs_grad(call: Call) -> bool:
    """Whether gradients are on and an input requires them."""
    try:
        if torch.is_grad_enabled():
            for x in call.differentiable:
                if x is not None and x.requires_grad:
                    return True
    except AttributeError:
        check_types(call)
        raise
    return False
