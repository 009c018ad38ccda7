"""Argument mapping onto fla-core 0.6's Kimi Delta Attention, for a decay per channel: its own entry
without gradients, its forward and backward pair with, as in `prefill.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from fla.ops.kda import chunk_kda
from fla.ops.kda.chunk_bwd import chunk_kda_bwd
from fla.ops.kda.chunk_fwd import chunk_kda_fwd
from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.problem import CHUNK, Call

from . import is_safe
from .prefill import activate, common, for_fla, options_of, raw_gradients

_own_entry: Callable[..., Any] = inspect.unwrap(chunk_kda)
"""The function behind fla's public entry, where FlashKDA may answer."""


def _prepare(call: Call) -> Call:
    """The call as fla may keep it. It takes initial states in float32 alone."""
    call = for_fla(call)
    if call.initial_state is None:
        return call
    return call._replace(initial_state=call.initial_state.float())


def _gate(call: Call) -> dict[str, Any]:
    """fla's keywords for a bounded gate."""
    return {"lower_bound": call.gate_lower_bound, "safe_gate": is_safe(call)}


def forward_only(call: Call) -> Forward:
    """fla's entry. Apart from the bound, `call` has its names."""
    options = options_of(_prepare(call))
    del options["chunk_indices"]
    o, final_state = _own_entry(**options, **_gate(call))
    return Forward(o, final_state, [])


def saved_like(call: Call) -> list[Tensor]:
    """In order: activated beta [B, T, HV]; pairs of q and k, and the inverse [B, T, HV, C]; with
    the L2 norm fused, normalised q, k [B, T, H, K] and their reciprocal norms [B, T, H]; without
    the gate fused, cumulative g [B, T, HV, K]."""
    B, T, H, K = call.q.shape
    HV = call.v.shape[2]
    saved = [call.q.new_empty((B, T, HV), dtype=torch.float32)]
    saved += [call.k.new_empty((B, T, HV, CHUNK)) for _ in range(2)]
    if call.use_qk_l2norm_in_kernel:
        norms = (call.q.new_empty((B, T, H), dtype=torch.float32) for _ in range(2))
        saved += [call.q.new_empty(call.q.shape), call.k.new_empty(call.k.shape), *norms]
    if not call.use_gate_in_kernel:
        saved.append(call.q.new_empty((B, T, HV, K), dtype=torch.float32))
    return saved


def forward(call: Call) -> Forward:
    """fla's forward, keeping what its backward reads. With the gate fused it keeps no cumulative g
    and computes it again."""
    call = _prepare(call)
    q, k, beta, norms = activate(call)
    o, final_state, g, qk, inverse, *_ = chunk_kda_fwd(
        q=q,
        k=k,
        v=call.v,
        g=call.g,
        beta=beta,
        initial_state=call.initial_state,
        output_final_state=call.output_final_state,
        cu_seqlens_cpu=call.cu_seqlens_cpu,
        **common(call),
        **_gate(call),
    )
    saved = [beta, qk, inverse, *norms]
    if not call.use_gate_in_kernel:
        saved.append(g)
    return Forward(o.to(call.v.dtype), final_state, saved)


def backward(
    call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
) -> Gradients:
    """fla's backward, and the fused options' own."""
    given, call = call, _prepare(call)
    beta, qk, inverse, *norms = saved
    g = None if call.use_gate_in_kernel else norms.pop()
    q, k = norms[:2] if call.use_qk_l2norm_in_kernel else (call.q, call.k)
    dq, dk, dv, dbeta, dg, dS, dA_log, ddt_bias = chunk_kda_bwd(
        q=q,
        k=k,
        v=call.v,
        beta=beta,
        Aqk=qk,
        Akk=inverse,
        initial_state=call.initial_state,
        do=grad_o.contiguous(),
        dht=None if grad_final_state is None else grad_final_state.contiguous(),
        g=g,
        g_org=call.g if call.use_gate_in_kernel else None,
        **common(call),
        **_gate(call),
    )
    call = call._replace(initial_state=given.initial_state)  # the dtype of its gradient
    return raw_gradients(call, norms, (dq, dk, dv, dg, dbeta, dS, dA_log, ddt_bias))
