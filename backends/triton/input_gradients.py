"""The last stage of backward: the gradients of all inputs, from the states and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdn.problem import CHUNK, Call

from .channel_gradients import channel_gradients_kernel
from .channel_prepare import decay_rows_kernel
from .gate_buffers import new_gate_buffers
from .grad_matrices import ROW
from .key_gradients import key_gradients_kernel
from .matrix_gradients import matrix_gradients_kernel
from .norm_gradients import NUM_ROW_SUMS, norm_gradients_kernel
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


def prepare_channel_rows(
    plan: PrefillPlan, call: Call, factors: Tensor, matrices: Tensor
) -> tuple[Tensors, Tensors]:
    """With a decay per channel: `decayed_rows` and `channel_decays`, and what is left for
    `compute_channel_gradients`."""
    decayed, gates = [new() for new in plan.new_decayed], new_gate_buffers(call)
    plan.bind(decay_rows_kernel, plan.slots * plan.constants["HV"], plan.chunk_sizes)(
        (call.q, call.k, call.g, call.A_log, call.dt_bias, factors, matrices, *decayed, *gates,
         call.cu_seqlens), call.scale
    )  # fmt: skip
    return tuple(decayed), (*gates, decayed[1])


def compute_channel_gradients(
    plan: PrefillPlan, call: Call, factors: Tensor, matrices: Tensor, given: Tensors, out: Tensors
) -> None:
    """The same with a decay per channel, and dU in place of R. `given` ends with selectors,
    gate_parts and channel_decays."""
    slots, H, HV, K, BK, BD = plan.slots, *(plan.constants[n] for n in ("H", "HV", "K", "BK", "BD"))
    (states, grad_states, *of_values), gates = given[:6], given[6:]
    dq, dk, dv, dg, dbeta, dA_log, ddt_bias, cu_seqlens = out
    dtype = torch.bfloat16 if call.q.dtype == torch.bfloat16 else torch.float32
    grad_matrices = factors.new_empty((slots, HV, 2, CHUNK, ROW.value), dtype=dtype)
    products = factors.new_empty((slots, HV, 3, CHUNK))
    tiles = -(-K // BD)
    row_sums = factors.new_empty((slots, HV, tiles, NUM_ROW_SUMS.value, CHUNK))
    grad_rows = None
    if HV > H or call.use_qk_l2norm_in_kernel:
        grad_rows = factors.new_empty((slots, HV, 2, CHUNK, BK))
    plan.bind(matrix_gradients_kernel, slots * HV, plan.chunk_sizes)(
        (call.v, factors, matrices, *of_values, dv, grad_matrices, products, cu_seqlens), call.scale
    )
    inputs = (call.q, call.k, call.g, factors, *gates, states, grad_states, *of_values)
    found = (grad_matrices, products, call.A_log, call.dt_bias, grad_rows, row_sums)
    plan.bind(channel_gradients_kernel, slots * HV * tiles, plan.chunk_sizes)(
        (*inputs, *found, dq, dk, dg, ddt_bias, cu_seqlens), call.scale
    )
    plan.bind(norm_gradients_kernel, slots * H, plan.chunk_sizes)(
        (call.q, call.k, factors, products, row_sums, grad_rows, dq, dk, dbeta, dA_log, cu_seqlens)
    )
