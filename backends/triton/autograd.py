"""Launches of the stages, forward and backward, and the buffers between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.problem import CHUNK, Call

from .gradients import gradients_kernel
from .output import local_gradient_kernel, output_kernel
from .prepare import prepare_kernel
from .reverse_scan import reverse_scan_kernel
from .scan import scan_kernel


class Slots(NamedTuple):
    """Chunks of all sequences, numbered; packed ones by tables made on the device, without a sync.

    `total` is exact for dense input, an upper bound for packed: slots past the end are not in use.
    """

    total: int
    cu_seqlens: Tensor | None
    sequence: Tensor | None  # [total], the sequence of each slot
    chunk: Tensor | None  # [total], its chunk within that; past the last one if not in use
    first: Tensor | None  # [N], the first slot of each sequence


def make_slots(call: Call) -> Slots:
    """The chunks of a call."""
    if call.cu_seqlens is None:
        return Slots(call.q.shape[0] * triton.cdiv(call.q.shape[1], CHUNK), None, None, None, None)
    total = call.q.shape[1] // CHUNK + call.sequences
    chunks = (call.cu_seqlens.diff() + CHUNK - 1) // CHUNK
    ends = chunks.cumsum(0)
    slots = torch.arange(total, device=ends.device)
    sequence = torch.searchsorted(ends, slots, right=True).clamp_(max=call.sequences - 1)
    first = ends - chunks
    return Slots(total, call.cu_seqlens, sequence, slots - first[sequence], first)


def saved_like(call: Call) -> list[Tensor]:
    """In order: G and beta [B, T, HV] in float32, A [B, T, HV, C] in the call's dtype."""
    B, T = call.q.shape[:2]
    HV = call.v.shape[2]
    scalars = [call.q.new_empty((B, T, HV), dtype=torch.float32) for _ in range(2)]
    return [*scalars, call.q.new_empty((B, T, HV, CHUNK))]


def _contiguous(call: Call) -> Call:
    tensors = {n: x.contiguous() for n, x in call._asdict().items() if isinstance(x, Tensor)}
    return call._replace(**tensors)  # type: ignore[arg-type]


def _sizes(call: Call) -> dict[str, Any]:
    K, V = call.q.shape[3], call.v.shape[3]
    return {
        "H": call.q.shape[2],
        "HV": call.v.shape[2],
        "K": K,
        "V": V,
        "BK": max(16, triton.next_power_of_2(K)),
        "BV": min(64, max(16, triton.next_power_of_2(V))),
        "C": CHUNK,
        "VARLEN": call.cu_seqlens is not None,
        "L2": call.use_qk_l2norm_in_kernel,
    }


def _chunks(slots: Slots, call: Call) -> tuple[Any, ...]:
    """Where a kernel that runs a program a chunk finds its tokens."""
    T = call.q.shape[1]
    return slots.cu_seqlens, slots.sequence, slots.chunk, T, triton.cdiv(T, CHUNK)


def _sequences(slots: Slots, call: Call) -> tuple[Any, ...]:
    """Where a kernel that walks along a sequence finds it."""
    T = call.q.shape[1]
    return slots.cu_seqlens, slots.first, T, triton.cdiv(T, CHUNK)


def _gates(call: Call) -> dict[str, Any]:
    return {
        "GATE": call.use_gate_in_kernel,
        "BIAS": call.dt_bias is not None,
        "SIGMOID": call.use_beta_sigmoid_in_kernel,
        "BETA_SCALE": 2.0 if call.allow_neg_eigval else 1.0,
    }


def _prepare(call: Call, slots: Slots) -> list[Tensor]:
    sizes, saved = _sizes(call), saved_like(call)
    grid = (slots.total * sizes["HV"],)
    del sizes["V"], sizes["BV"]
    prepare_kernel[grid](
        call.k, call.g, call.beta, call.A_log, call.dt_bias, *saved, *_chunks(slots, call),
        **sizes, **_gates(call),
    )  # fmt: skip
    return saved


def _scan(call: Call, slots: Slots, saved: list[Tensor], final: Tensor | None) -> list[Tensor]:
    """The state before every chunk [slots, HV, K, V], and U like v."""
    sizes = _sizes(call)
    states = call.q.new_empty((slots.total, *(sizes[name] for name in ("HV", "K", "V"))))
    U = torch.empty_like(call.v)
    scan_kernel[(call.sequences * sizes["HV"] * triton.cdiv(sizes["V"], sizes["BV"]),)](
        call.k, call.v, *saved, call.initial_state, states, U, final, *_sequences(slots, call),
        **sizes, V_FIRST=call.state_v_first, INITIAL=call.initial_state is not None,
        FINAL=final is not None,
    )  # fmt: skip
    return [states, U]


def forward(call: Call, save: bool) -> Forward:
    """See `gdn.backend.Backend.forward`."""
    call = _contiguous(call)
    slots, sizes = make_slots(call), _sizes(call)
    saved = _prepare(call, slots)
    final = None
    if call.output_final_state:
        final = call.q.new_empty(call.state_shape, dtype=call.state_dtype)
    states, U = _scan(call, slots, saved, final)
    o = torch.empty_like(call.v)
    output_kernel[(slots.total * sizes["HV"] * triton.cdiv(sizes["V"], sizes["BV"]),)](
        call.q, call.k, saved[0], states, U, o, call.scale, *_chunks(slots, call), **sizes
    )
    return Forward(o, final, saved if save else [])


def backward(
    call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
) -> Gradients:
    """See `gdn.backend.Backend.backward`. The states are computed again, not kept."""
    call, grad_o = _contiguous(call), grad_o.contiguous()
    slots, sizes = make_slots(call), _sizes(call)
    blocks = triton.cdiv(sizes["V"], sizes["BV"])
    G, beta, A = saved
    states, U = _scan(call, slots, saved, None)
    R = torch.empty_like(call.v)
    local_gradient_kernel[(slots.total * sizes["HV"] * blocks,)](
        call.q, call.k, G, grad_o, R, call.scale, *_chunks(slots, call), **sizes
    )
    grad_states = torch.empty_like(states)
    dS = None if call.initial_state is None else torch.empty_like(call.initial_state)
    grad_final = None if grad_final_state is None else grad_final_state.contiguous()
    reverse_scan_kernel[(call.sequences * sizes["HV"] * blocks,)](
        call.q, call.k, G, beta, A, grad_o, R, grad_final, grad_states, dS, call.scale,
        *_sequences(slots, call), **sizes, V_FIRST=call.state_v_first,
        FINAL=grad_final is not None, INITIAL=dS is not None,
    )  # fmt: skip
    dq, dk, dg, dbeta = (torch.empty_like(x) for x in (call.q, call.k, call.g, call.beta))
    partial = [
        None if x is None else x.new_zeros((slots.total, sizes["HV"]), dtype=torch.float32)
        for x in (call.A_log, call.dt_bias)
    ]
    gradients_kernel[(slots.total * sizes["H"],)](
        call.q, call.k, call.v, call.g, call.beta, G, beta, states, grad_states, U, R, grad_o,
        call.A_log, call.dt_bias, dq, dk, dg, dbeta, *partial, call.scale,
        *_chunks(slots, call), **sizes, **_gates(call),
    )  # fmt: skip
    sums = (
        None if x is None or rows is None else rows.sum(0).to(x.dtype)
        for x, rows in zip((call.A_log, call.dt_bias), partial, strict=True)
    )
    return Gradients(dq, dk, R, dg, dbeta, dS, *sums)
