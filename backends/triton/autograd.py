"""Launches of the stages, forward and backward, and the buffers between them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.problem import CHUNK, Call

from .carry import carry_kernel
from .cut import Cut, cut, parallel_length, pieces
from .key_gradients import key_gradients_kernel
from .launch import launch
from .prepare import prepare_kernel
from .query_gradients import query_gradients_kernel
from .reverse_scan import reverse_scan_kernel
from .scan import scan_kernel
from .tiles import FACTORS


def saved_like(call: Call) -> list[Tensor]:
    """In order, for every slot and value head: `factors` in float32; A diag(beta), P and A in the
    call's dtype (see `tiles.py`); and if the call is walked in parallel, what each piece does to
    the state, and the state that it begins with (see `carry.py`)."""
    (HV, V), K = call.v.shape[2:], call.q.shape[3]
    slots, length = pieces(call, CHUNK), parallel_length(call)
    factors = call.q.new_empty((slots, HV, FACTORS.value, CHUNK), dtype=torch.float32)
    saved = [factors, *(call.q.new_empty((slots, HV, CHUNK, CHUNK)) for _ in range(3))]
    if length:
        shapes = [(pieces(call, length), HV, rows, K) for rows in (V + K, V)]
        saved += [factors.new_empty(shape) for shape in shapes]
    return saved


class Launches:
    """The stages, bound to one call: what they all take, and where its tokens are."""

    def __init__(self, call: Call) -> None:
        tensors = {n: x.contiguous() for n, x in call._asdict().items() if isinstance(x, Tensor)}
        self.call = call = call._replace(**tensors)  # type: ignore[arg-type]
        T, length = call.q.shape[1], parallel_length(call)
        self.slots = cut(call, CHUNK)
        self.pieces = cut(call, length) if length else None
        self.sizes: dict[str, Any] = {
            "H": call.q.shape[2],
            "HV": call.v.shape[2],
            "K": call.q.shape[3],
            "V": call.v.shape[3],
            "BK": max(16, triton.next_power_of_2(call.q.shape[3])),
            "C": CHUNK,
            "VARLEN": call.cu_seqlens is not None,
        }
        self.options = {
            "L2": call.use_qk_l2norm_in_kernel,
            "GATE": call.use_gate_in_kernel,
            "BIAS": call.dt_bias is not None,
            "SIGMOID": call.use_beta_sigmoid_in_kernel,
            "BETA_SCALE": 2.0 if call.allow_neg_eigval else 1.0,
        }
        self.chunks = (call.cu_seqlens, self.slots.sequence, self.slots.index, T, self.slots.each)

    def walk(self, along: Cut | None) -> tuple[Any, ...]:
        """Where a kernel that walks along the pieces (None: the sequences) finds them."""
        T, slots = self.call.q.shape[1], self.slots
        tables = (None, None) if along is None else (along.sequence, along.index)
        each, length = (1, slots.each) if along is None else (along.each, along.length // CHUNK)
        return (self.call.cu_seqlens, *tables, slots.first, T, slots.each, each, length)

    def prepare(self, saved: list[Tensor], save: bool) -> None:
        call, sizes = self.call, {n: x for n, x in self.sizes.items() if n != "V"}
        launch(
            prepare_kernel, self.slots.total * sizes["HV"],
            call.q, call.k, call.g, call.beta, call.A_log, call.dt_bias, *saved[:4], call.scale,
            *self.chunks, **sizes, **self.options, SAVE=save,
        )  # fmt: skip

    def scan(
        self, saved: list[Tensor], along: Cut | None, initial: Tensor | None, v_first: bool,
        o: Tensor | None = None, final: Tensor | None = None, states: Tensor | None = None,
        U: Tensor | None = None, transfer: bool = False,
    ) -> None:  # fmt: skip
        call = self.call
        launch(
            scan_kernel, (along.total if along else call.sequences) * self.sizes["HV"],
            call.q, call.k, call.v, *saved[:3], initial, o, final, states, U, *self.walk(along),
            **self.sizes, V_FIRST=v_first, INITIAL=initial is not None, FINAL=final is not None,
            OUTPUT=o is not None, STATES=states is not None, TRANSFER=transfer,
            CUT=along is not None,
        )  # fmt: skip

    def reverse_scan(
        self, saved: list[Tensor], along: Cut | None, grad_o: Tensor, grad_final: Tensor | None,
        v_first: bool, R: Tensor | None, grad_states: Tensor | None, dS: Tensor | None,
    ) -> None:  # fmt: skip
        call, (factors, _, P, A) = self.call, saved[:4]
        launch(
            reverse_scan_kernel, (along.total if along else call.sequences) * self.sizes["HV"],
            call.q, call.k, factors, A, P, grad_o, grad_final, R, grad_states, dS,
            *self.walk(along), **self.sizes, V_FIRST=v_first, FINAL=grad_final is not None,
            INITIAL=dS is not None, KEEP=R is not None, CUT=along is not None,
        )  # fmt: skip

    def carry(
        self, along: Cut, walked: Tensor, own: Tensor, initial: Tensor | None, begins: Tensor,
        final: Tensor | None, reverse: bool,
    ) -> None:  # fmt: skip
        call, sizes = self.call, {n: self.sizes[n] for n in ("HV", "K", "V", "C", "VARLEN")}
        launch(
            carry_kernel, call.sequences * sizes["HV"],
            walked, own, initial, begins, final, call.cu_seqlens, along.first, call.q.shape[1],
            along.each, along.length // CHUNK, **sizes, V_FIRST=call.state_v_first,
            INITIAL=initial is not None, FINAL=final is not None, REVERSE=reverse,
        )  # fmt: skip


def forward(call: Call, save: bool) -> Forward:
    """See `gdn.backend.Backend.forward`."""
    stages, saved = Launches(call), saved_like(call)
    call, along = stages.call, stages.pieces
    final = None
    if call.output_final_state:
        final = call.q.new_empty(call.state_shape, dtype=call.state_dtype)
    o = torch.empty_like(call.v)
    stages.prepare(saved, save)
    if along is None:
        stages.scan(saved, None, call.initial_state, call.state_v_first, o, final)
    else:
        walked, begins = saved[4:]
        stages.scan(saved, along, None, True, final=walked, transfer=True)
        stages.carry(along, walked, walked, call.initial_state, begins, final, reverse=False)
        stages.scan(saved, along, begins, True, o)
    return Forward(o, final, saved if save else [])


def backward(
    call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
) -> Gradients:
    """See `gdn.backend.Backend.backward`. The states are computed again, not kept."""
    stages, grad_o = Launches(call), grad_o.contiguous()
    call, along, slots, sizes = stages.call, stages.pieces, stages.slots.total, stages.sizes
    HV, K, V = sizes["HV"], sizes["K"], sizes["V"]
    states, grad_states = (call.q.new_empty((slots, HV, V, K)) for _ in range(2))
    U, R = (call.q.new_empty((slots, HV, V, CHUNK)) for _ in range(2))
    dS = None if call.initial_state is None else torch.empty_like(call.initial_state)
    grad_final = None if grad_final_state is None else grad_final_state.contiguous()
    v_first = call.state_v_first
    if along is None:
        stages.scan(saved, None, call.initial_state, v_first, states=states, U=U)
        stages.reverse_scan(saved, None, grad_o, grad_final, v_first, R, grad_states, dS)
    else:
        walked, begins = saved[4:]
        stages.scan(saved, along, begins, True, states=states, U=U)
        own, ends = torch.empty_like(begins), torch.empty_like(begins)
        stages.reverse_scan(saved, along, grad_o, None, True, None, None, own)
        stages.carry(along, walked, own, grad_final, ends, dS, reverse=True)
        stages.reverse_scan(saved, along, grad_o, ends, True, R, grad_states, None)

    factors, P = saved[0], saved[2]
    dq, dk, dv, dg, dbeta = (torch.empty_like(x) for x in call[:5])
    dG = torch.empty_like(factors[:, :, 0])
    partial = [
        None if x is None else x.new_zeros((slots, HV), dtype=torch.float32)
        for x in (call.A_log, call.dt_bias)
    ]
    launch(
        query_gradients_kernel, slots * sizes["H"],
        call.q, call.k, factors, P, states, U, grad_o, dq, dG, call.scale,
        *stages.chunks, **sizes, L2=call.use_qk_l2norm_in_kernel,
    )  # fmt: skip
    launch(
        key_gradients_kernel, slots * sizes["H"],
        call.q, call.k, call.v, call.g, factors, states, grad_states, U, R, grad_o, dG,
        call.A_log, call.dt_bias, dk, dv, dg, dbeta, *partial, call.scale,
        *stages.chunks, **sizes, **stages.options,
    )  # fmt: skip
    sums = (
        None if x is None or rows is None else rows.sum(0).to(x.dtype)
        for x, rows in zip((call.A_log, call.dt_bias), partial, strict=True)
    )
    return Gradients(dq, dk, dv, dg, dbeta, dS, *sums)
