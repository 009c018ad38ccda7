"""Argument mapping onto fla-core 0.6: its public entry without gradients, its forward and backward
pair with.

The pair is what fla's own autograd.Function calls; taking it from there lets backward keep fla's
intermediates (no second forward), which an op behind torch.ops cannot get from the public entry.
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from fla.modules.norm.l2norm import l2norm_bwd, l2norm_fwd
from fla.ops.common.gate import fused_beta_sigmoid_bwd, fused_beta_sigmoid_fwd
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd
from fla.ops.utils.index import prepare_chunk_indices
from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.problem import CHUNK, Call

_own_entry: Callable[..., Any] = inspect.unwrap(chunk_gated_delta_rule)


def entry() -> Callable[..., Any]:
    """fla's public entry, where FlashQLA may answer, if FLA_FLASH_QLA asks for that (fla's own
    default is on); else the function behind it, which is fla's own path."""
    if os.environ.get("FLA_FLASH_QLA", "0") != "0":
        return cast(Callable[..., Any], chunk_gated_delta_rule)
    return _own_entry


def beta_scale(call: Call) -> float:
    return 2.0 if call.allow_neg_eigval else 1.0


class _Lengths(NamedTuple):
    """What is derived from cu_seqlens while it does not change: the same values as another tensor
    object, and the last one."""

    tensor: weakref.ref[Tensor]
    version: int
    alias: Tensor
    last: int


_lengths: dict[int, _Lengths] = {}


def _derive(x: Tensor) -> _Lengths:
    """The derived values of the last call while x has not changed since, new ones when it has.

    fla keeps what it derives from cu_seqlens by the identity of the tensor, and would not notice
    that its values have changed in place.
    """
    key, version = id(x), -1 if x.is_inference() else x._version
    seen = _lengths.get(key)
    if seen is not None and seen.tensor() is x and seen.version == version >= 0:
        return seen
    reference = weakref.ref(x, lambda _: _lengths.pop(key, None))
    found = _Lengths(reference, version, x.detach().view(x.shape), int(x[-1]))
    if version >= 0:  # an inference tensor does not say when it changes
        _lengths[key] = found
    return found


def last_token(call: Call) -> int:
    """The number of tokens up to the end of the last sequence. Reads cu_seqlens on the host, which
    fla does as well."""
    if call.cu_seqlens is None:
        return call.q.shape[1]
    host = call.cu_seqlens_cpu
    return _derive(call.cu_seqlens).last if host is None else int(host[-1])


def for_fla(call: Call) -> Call:
    """The call as fla may keep it: contiguous, and lengths under another identity once they have
    changed."""
    tensors = {n: x.contiguous() for n, x in call._asdict().items() if isinstance(x, Tensor)}
    lengths = ("cu_seqlens", "cu_seqlens_cpu")
    tensors |= {
        name: _derive(x).alias.contiguous()
        for name in lengths
        if (x := getattr(call, name)) is not None
    }
    return call._replace(**tensors)  # type: ignore[arg-type]


def options_of(call: Call) -> dict[str, Any]:
    """A call by its names, which are fla's. Without the bound of the gate, which fla has per
    channel alone and under another name, and without gdn's modes."""
    options: dict[str, Any] = call._asdict()
    for name in ("gate_lower_bound", "batch_invariant", "context_parallel"):
        del options[name]
    return options


def forward_only(call: Call) -> Forward:
    """fla's entry."""
    o, final_state = entry()(**options_of(for_fla(call)))
    return Forward(o, final_state, [])


def saved_like(call: Call) -> list[Tensor]:
    """In order: cumulative g, activated beta [B, T, HV]; inverse [B, T, HV, C]; and with the L2
    norm fused
    normalised q, k [B, T, H, K] and their reciprocal norms [B, T, H]."""
    B, T, H, _ = call.q.shape
    HV = call.v.shape[2]
    saved = [
        call.q.new_empty((B, T, HV), dtype=torch.float32),
        call.q.new_empty((B, T, HV), dtype=torch.float32),
        call.k.new_empty((B, T, HV, CHUNK)),
    ]
    if call.use_qk_l2norm_in_kernel:
        norms = (call.q.new_empty((B, T, H), dtype=torch.float32) for _ in range(2))
        saved += [call.q.new_empty(call.q.shape), call.k.new_empty(call.k.shape), *norms]
    return saved


def common(call: Call) -> dict[str, Any]:
    """Keywords that fla's forward and backward share."""
    indices = call.chunk_indices
    if indices is None and call.cu_seqlens is not None:
        indices = prepare_chunk_indices(call.cu_seqlens, CHUNK, cu_seqlens_cpu=call.cu_seqlens_cpu)
    return {
        "scale": call.scale,
        "state_v_first": call.state_v_first,
        "cu_seqlens": call.cu_seqlens,
        "chunk_indices": indices,
        "use_gate_in_kernel": call.use_gate_in_kernel,
        "A_log": call.A_log,
        "dt_bias": call.dt_bias,
        "chunk_size": CHUNK,
    }


def activate(call: Call) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """q, k and beta with the fused options applied, and what saved holds of the L2 norm."""
    q, k, norms = call.q, call.k, []
    if call.use_qk_l2norm_in_kernel:
        (q, q_rstd), (k, k_rstd) = l2norm_fwd(q), l2norm_fwd(k)
        norms = [q, k, q_rstd, k_rstd]
    if call.use_beta_sigmoid_in_kernel:
        beta = fused_beta_sigmoid_fwd(call.beta, scale=beta_scale(call))
    else:
        beta = call.beta.to(torch.float32, copy=True)
    return q, k, beta, norms


def forward(call: Call) -> Forward:
    """fla's forward, keeping what its backward reads."""
    call = for_fla(call)
    q, k, beta, norms = activate(call)
    g, o, A, final_state, _, _ = chunk_gated_delta_rule_fwd(
        q=q,
        k=k,
        v=call.v,
        g=call.g,
        beta=beta,
        initial_state=call.initial_state,
        output_final_state=call.output_final_state,
        **common(call),
    )
    return Forward(o.to(call.v.dtype), final_state, [g, beta, A, *norms])


def backward(
    call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
) -> Gradients:
    """fla's backward, and the fused options' own."""
    call = for_fla(call)
    g, beta, A = saved[:3]
    q, k = saved[3:5] if call.use_qk_l2norm_in_kernel else (call.q, call.k)
    dq, dk, dv, dbeta, dg, dS, dA_log, ddt_bias = chunk_gated_delta_rule_bwd(
        q=q,
        k=k,
        v=call.v,
        g=g,
        beta=beta,
        A=A,
        initial_state=call.initial_state,
        do=grad_o.contiguous(),
        dht=None if grad_final_state is None else grad_final_state.contiguous(),
        g_input=call.g if call.use_gate_in_kernel else None,
        **common(call),
    )
    return raw_gradients(call, saved[3:], (dq, dk, dv, dg, dbeta, dS, dA_log, ddt_bias))


def raw_gradients(
    call: Call, norms: list[Tensor], gradients: tuple[Tensor | None, ...]
) -> Gradients:
    """Gradients of the call's own inputs, in their shapes and dtypes, from those of the activated
    q, k and beta, and the others'. norms as of `activate`."""
    dq, dk, dv, dg, dbeta, *rest = gradients
    if call.use_qk_l2norm_in_kernel:
        q, k, q_rstd, k_rstd = norms
        dq, dk = l2norm_bwd(q, q_rstd, dq), l2norm_bwd(k, k_rstd, dk)
    if call.use_beta_sigmoid_in_kernel:
        dbeta = fused_beta_sigmoid_bwd(call.beta, dbeta, scale=beta_scale(call))
    return Gradients(
        *(
            None if x is None or gradient is None else gradient.to(x.dtype).reshape(x.shape)
            for x, gradient in zip(call.differentiable, (dq, dk, dv, dg, dbeta, *rest), strict=True)
        )  # type: ignore[arg-type]
    )
