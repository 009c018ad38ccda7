"""Launches of the stages, forward and backward, and the buffers between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.problem import CHUNK, Call

from .key_gradients import key_gradients_kernel
from .launch import launch
from .prepare import prepare_kernel
from .query_gradients import query_gradients_kernel
from .reverse_scan import reverse_scan_kernel
from .scan import scan_kernel
from .tiles import FACTORS


class Slots(NamedTuple):
    """Chunks of all sequences, numbered; packed ones by tables made on the device, without a sync.

    `total` is exact for dense input, an upper bound for packed: slots past the end are not in use.
    """

    total: int
    cu_seqlens: Tensor | None
    sequence: Tensor | None  # [total], the sequence of each slot
    chunk: Tensor | None  # [total], its chunk within that; past the last one if not in use
    first: Tensor | None  # [N], the first slot of each sequence


def slot_count(call: Call) -> int:
    """`Slots.total`, from shapes alone."""
    B, T = call.q.shape[:2]
    return T // CHUNK + call.sequences if call.cu_seqlens is not None else B * -(-T // CHUNK)


def make_slots(call: Call) -> Slots:
    """The chunks of a call."""
    total = slot_count(call)
    if call.cu_seqlens is None:
        return Slots(total, None, None, None, None)
    chunks = (call.cu_seqlens.diff() + CHUNK - 1) // CHUNK
    ends = chunks.cumsum(0)
    slots = torch.arange(total, device=ends.device)
    sequence = torch.searchsorted(ends, slots, right=True).clamp_(max=call.sequences - 1)
    first = ends - chunks
    return Slots(total, call.cu_seqlens, sequence, slots - first[sequence], first)


def saved_like(call: Call) -> list[Tensor]:
    """In order, for every slot and value head: `factors` in float32; A diag(beta), P and A in the
    call's dtype. See `tiles.py`."""
    HV = call.v.shape[2]
    slots = slot_count(call)
    factors = call.q.new_empty((slots, HV, FACTORS.value, CHUNK), dtype=torch.float32)
    return [factors, *(call.q.new_empty((slots, HV, CHUNK, CHUNK)) for _ in range(3))]


def _contiguous(call: Call) -> Call:
    tensors = {n: x.contiguous() for n, x in call._asdict().items() if isinstance(x, Tensor)}
    return call._replace(**tensors)  # type: ignore[arg-type]


def _sizes(call: Call) -> dict[str, Any]:
    return {
        "H": call.q.shape[2],
        "HV": call.v.shape[2],
        "K": call.q.shape[3],
        "V": call.v.shape[3],
        "BK": max(16, triton.next_power_of_2(call.q.shape[3])),
        "C": CHUNK,
        "VARLEN": call.cu_seqlens is not None,
    }


def _chunks(slots: Slots, call: Call) -> tuple[Any, ...]:
    """Where a kernel that runs a program a chunk finds its tokens."""
    T = call.q.shape[1]
    return slots.cu_seqlens, slots.sequence, slots.chunk, T, triton.cdiv(T, CHUNK)


def _sequences(slots: Slots, call: Call) -> tuple[Any, ...]:
    """Where a kernel that walks along a sequence finds it."""
    T = call.q.shape[1]
    return slots.cu_seqlens, slots.first, T, triton.cdiv(T, CHUNK)


def _options(call: Call) -> dict[str, Any]:
    return {
        "L2": call.use_qk_l2norm_in_kernel,
        "GATE": call.use_gate_in_kernel,
        "BIAS": call.dt_bias is not None,
        "SIGMOID": call.use_beta_sigmoid_in_kernel,
        "BETA_SCALE": 2.0 if call.allow_neg_eigval else 1.0,
    }


def _scan(
    call: Call, slots: Slots, saved: list[Tensor], o: Tensor | None, final: Tensor | None,
    states: Tensor | None = None, U: Tensor | None = None,
) -> None:  # fmt: skip
    sizes = _sizes(call)
    launch(
        scan_kernel, call.sequences * sizes["HV"],
        call.q, call.k, call.v, *saved[:3], call.initial_state, o, final, states, U,
        *_sequences(slots, call), **sizes, V_FIRST=call.state_v_first,
        INITIAL=call.initial_state is not None, FINAL=final is not None, OUTPUT=o is not None,
        STATES=states is not None,
    )  # fmt: skip


def forward(call: Call, save: bool) -> Forward:
    """See `gdn.backend.Backend.forward`."""
    call = _contiguous(call)
    slots, sizes, saved = make_slots(call), _sizes(call), saved_like(call)
    del sizes["V"]
    launch(
        prepare_kernel, slots.total * sizes["HV"],
        call.q, call.k, call.g, call.beta, call.A_log, call.dt_bias, *saved, call.scale,
        *_chunks(slots, call), **sizes, **_options(call), SAVE=save,
    )  # fmt: skip
    final = None
    if call.output_final_state:
        final = call.q.new_empty(call.state_shape, dtype=call.state_dtype)
    o = torch.empty_like(call.v)
    _scan(call, slots, saved, o, final)
    return Forward(o, final, saved if save else [])


def backward(
    call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
) -> Gradients:
    """See `gdn.backend.Backend.backward`. The states are computed again, not kept."""
    call, grad_o = _contiguous(call), grad_o.contiguous()
    slots, sizes = make_slots(call), _sizes(call)
    factors, _, P, A = saved
    HV, K, V = sizes["HV"], sizes["K"], sizes["V"]
    states, grad_states = (call.q.new_empty((slots.total, HV, V, K)) for _ in range(2))
    U, R = (call.q.new_empty((slots.total, HV, V, CHUNK)) for _ in range(2))
    _scan(call, slots, saved, None, None, states, U)
    dS = None if call.initial_state is None else torch.empty_like(call.initial_state)
    grad_final = None if grad_final_state is None else grad_final_state.contiguous()
    launch(
        reverse_scan_kernel, call.sequences * HV,
        call.q, call.k, factors, A, P, grad_o, grad_final, R, grad_states, dS,
        *_sequences(slots, call), **sizes, V_FIRST=call.state_v_first,
        FINAL=grad_final is not None, INITIAL=dS is not None,
    )  # fmt: skip
    dq, dk, dv, dg, dbeta = (torch.empty_like(x) for x in call[:5])
    partial = [
        None if x is None else x.new_zeros((slots.total, HV), dtype=torch.float32)
        for x in (call.A_log, call.dt_bias)
    ]
    dG = torch.empty_like(factors[:, :, 0])
    launch(
        query_gradients_kernel, slots.total * sizes["H"],
        call.q, call.k, factors, P, states, U, grad_o, dq, dG, call.scale,
        *_chunks(slots, call), **sizes, L2=call.use_qk_l2norm_in_kernel,
    )  # fmt: skip
    launch(
        key_gradients_kernel, slots.total * sizes["H"],
        call.q, call.k, call.v, call.g, factors, states, grad_states, U, R, grad_o, dG,
        call.A_log, call.dt_bias, dk, dv, dg, dbeta, *partial, call.scale,
        *_chunks(slots, call), **sizes, **_options(call),
    )  # fmt: skip
    sums = (
        None if x is None or rows is None else rows.sum(0).to(x.dtype)
        for x, rows in zip((call.A_log, call.dt_bias), partial, strict=True)
    )
    return Gradients(dq, dk, dv, dg, dbeta, dS, *sums)
