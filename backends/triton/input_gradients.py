"""The last stage of backward: the gradients of all inputs, from the states and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdn.problem import CHUNK, Call

from .channel_gradients import channel_gradients_kernel
from .key_gradients import key_gradients_kernel
from .matrix_gradients import matrix_gradients_kernel
from .query_gradients import query_gradients_kernel

if TYPE_CHECKING:
    from .plan import PrefillPlan

Tensors = tuple[Tensor | None, ...]


def compute_gradients(
    plan: PrefillPlan, call: Call, factors: Tensor, matrices: Tensor, given: Tensors, out: Tensors
) -> None:
    """Fill the gradients in `out`: dq, dk, dv, dg, dbeta, terms of dA_log and ddt_bias; last is
    cu_seqlens. `given`: the states, their gradients, U, R, row_scales and dO."""
    (states, _, U, _, row_scales, grad_o), (dq, *rest) = given, out
    programs, dG_from_o = plan.slots * plan.constants["H"], torch.empty_like(factors[:, :, 0])
    for_q = (call.q, call.k, factors, matrices, states, U, row_scales, grad_o)
    plan.bind(query_gradients_kernel, programs, plan.chunk_sizes)(
        (*for_q, dq, dG_from_o, call.cu_seqlens), call.scale
    )
    for_k = (call.q, call.k, call.v, call.g, factors, *given, dG_from_o)
    plan.bind(key_gradients_kernel, programs, plan.chunk_sizes)(
        (*for_k, call.A_log, call.dt_bias, *rest), call.scale
    )


def compute_channel_gradients(
    plan: PrefillPlan, call: Call, factors: Tensor, matrices: Tensor, given: Tensors, out: Tensors
) -> None:
    """The same with a decay per channel, and dU in place of R."""
    slots, H, HV, BK = plan.slots, *(plan.constants[n] for n in ("H", "HV", "BK"))
    (states, grad_states, *of_values), (dq, dk, dv, *rest) = given, out
    dtype = torch.bfloat16 if call.q.dtype == torch.bfloat16 else torch.float32
    grad_matrices = factors.new_empty((slots, HV, 2, CHUNK, CHUNK), dtype=dtype)
    products = factors.new_empty((slots, HV, 3, CHUNK))
    found = (grad_matrices, products)
    needs_sums = HV > H or call.use_qk_l2norm_in_kernel
    sums = factors.new_empty((slots, H, 2, CHUNK, BK)) if needs_sums else None
    plan.bind(matrix_gradients_kernel, slots * HV, plan.chunk_sizes)(
        (call.v, factors, matrices, *of_values, dv, *found, call.cu_seqlens), call.scale
    )
    inputs = (call.q, call.k, call.g, factors, states, grad_states, *of_values, *found)
    plan.bind(channel_gradients_kernel, slots * H, plan.chunk_sizes)(
        (*inputs, call.A_log, call.dt_bias, sums, dq, dk, *rest), call.scale
    )
