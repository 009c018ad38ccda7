"""The stages in order, forward and backward, and the buffers between them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from gdn.backend import Forward, Gradients, Plan
from gdn.problem import CALL_TENSORS, CHUNK, Call

from ..common.allocation import allocator
from ..common.chunking import piece_slots
from .combine_pieces import carry_kernel
from .key_gradients import key_gradients_kernel
from .launch import Stage, configuration
from .piece_length import piece_length, shared_memory
from .prepare import prepare_kernel
from .query_gradients import query_gradients_kernel
from .reverse_scan import reverse_scan_kernel
from .scan import scan_kernel
from .tiles import FACTORS, MATRICES


def saved_shapes(call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What forward hands on: `factors` and `matrices` (see `tiles.py`); and if the call is walked
    in parallel, what each piece does to the state, and the state that it begins with (see
    `carry.py`)."""
    (HV, V), K = call.v.shape[2:], call.q.shape[3]
    slots, length = piece_slots(call, CHUNK), piece_length(call)
    shapes = [
        ((slots, HV, FACTORS.value, CHUNK), torch.float32),
        ((slots, HV, MATRICES.value, CHUNK, CHUNK), call.q.dtype),
    ]
    if length:
        shapes += [((piece_slots(call, length), HV, n, K), torch.float32) for n in (V + K, V)]
    return shapes


def _contiguous(call: Call) -> Call:
    tensors: tuple[Tensor | None, ...] = call[:CALL_TENSORS]  # type: ignore[assignment]
    for x in tensors:
        if x is not None and not x.is_contiguous():
            copies = (None if x is None else x.contiguous() for x in tensors)
            return Call(*copies, *call[CALL_TENSORS:])  # type: ignore[arg-type]
    return call


class PrefillPlan(Plan):
    """All that calls of one kind (shapes, dtypes, device, options) have in common."""

    def __init__(self, call: Call) -> None:
        T, HV = call.q.shape[1], call.v.shape[2]
        self.slots, self.length = piece_slots(call, CHUNK), piece_length(call)
        each = -(-T // CHUNK)
        self.chunks = (call.sequences, T, each)
        self.common: dict[str, Any] = {
            "H": call.q.shape[2],
            "HV": HV,
            "K": call.q.shape[3],
            "V": call.v.shape[3],
            "C": CHUNK,
            # narrower tiles, split between warpgroups, are read past their end (Triton 3.6)
            "BK": max(64, triton.next_power_of_2(call.q.shape[3])),
            "VARLEN": call.cu_seqlens is not None,
            "L2": call.use_qk_l2norm_in_kernel,
            "GATE": call.use_gate_in_kernel,
            "BIAS": call.dt_bias is not None,
            "SIGMOID": call.use_beta_sigmoid_in_kernel,
            "BETA_SCALE": 2.0 if call.allow_neg_eigval else 1.0,
        }
        self.device, self.itemsize = call.q.device, call.q.element_size()
        self.new_saved = [allocator(*kind, self.device) for kind in saved_shapes(call)]
        self.new_o = allocator(call.v.shape, call.v.dtype, self.device)
        self.new_final = allocator(call.state_shape, torch.float32, self.device)
        self.stages: dict[tuple[object, ...], Stage] = {}
        self.runs: dict[bool, list[Stage]] = {}
        self.walks, cut = call.sequences * HV, (1, each)
        if self.length:
            self.walks = piece_slots(call, self.length) * HV
            cut = (-(-T // self.length), self.length // CHUNK)
        self.cut, self.across = cut, (*self.chunks, *cut)

    def stage(self, kernel: Any, programs: int, sizes: tuple[int, ...], **flags: bool) -> Stage:
        """A kernel bound to sizes, to what it takes of the plan's constants, and to more."""
        key = (kernel.fn, *flags.values())
        if key not in self.stages:
            constants = {n: x for n, x in self.common.items() if n in kernel.arg_names} | flags
            name, room = kernel.fn.__name__, shared_memory(self.device)
            chosen = configuration(name, self.common["BK"], self.itemsize, self.walks, room)
            self.stages[key] = Stage(kernel, programs, chosen, sizes, **constants)
        return self.stages[key]

    def scan(self, call: Call, o: bool, final: bool, states: bool, transfer: bool) -> Stage:
        cut = self.length is not None
        initial = not transfer if cut else call.initial_state is not None
        return self.stage(
            scan_kernel, self.walks, self.across, V_FIRST=cut or call.state_v_first,
            INITIAL=initial, FINAL=final, OUTPUT=o, STATES=states, TRANSFER=transfer, CUT=cut,
        )  # fmt: skip

    def reverse_scan(self, call: Call, final: bool, initial: bool, keep: bool) -> Stage:
        cut = self.length is not None
        return self.stage(
            reverse_scan_kernel, self.walks, self.across, V_FIRST=cut or call.state_v_first,
            FINAL=final, INITIAL=initial, KEEP=keep, CUT=cut,
        )  # fmt: skip

    def carry(self, call: Call, initial: bool, final: bool, reverse: bool) -> Stage:
        return self.stage(
            carry_kernel, call.sequences * self.common["HV"], self.cut, V_FIRST=call.state_v_first,
            INITIAL=initial, FINAL=final, REVERSE=reverse,
        )  # fmt: skip

    def forwards(self, call: Call, save: bool) -> list[Stage]:
        """Forward's stages, in their order."""
        prepare = self.stage(prepare_kernel, self.slots * self.common["HV"], self.chunks, SAVE=save)
        initial, final = call.initial_state is not None, call.output_final_state
        if self.length is None:
            return [prepare, self.scan(call, o=True, final=final, states=False, transfer=False)]
        return [
            prepare,
            self.scan(call, o=False, final=True, states=False, transfer=True),
            self.carry(call, initial, final, reverse=False),
            self.scan(call, o=True, final=False, states=False, transfer=False),
        ]

    def forward(self, call: Call, save: bool) -> Forward:
        """See `gdn.backend.Plan.forward`."""
        q, k, v, g, beta, initial, A_log, dt_bias, cu_seqlens, *_ = call = _contiguous(call)
        saved = [new() for new in self.new_saved]
        factors, matrices, *parallel = saved
        final = self.new_final() if call.output_final_state else None
        o = self.new_o()
        if save not in self.runs:
            self.runs[save] = self.forwards(call, save)
        prepare, *walks = self.runs[save]
        prepare((q, k, g, beta, A_log, dt_bias, factors, matrices, cu_seqlens), call.scale)
        tensors = (q, k, v, factors, matrices)
        if parallel:
            walked, begins = parallel
            if save and cu_seqlens is not None:
                begins.zero_()  # numbers of pieces may stay unused
            walks[0]((*tensors, None, None, walked, None, None, cu_seqlens))
            walks[1]((walked, walked, initial, begins, final, cu_seqlens))
            walks[2]((*tensors, begins, o, None, None, None, cu_seqlens))
        else:
            walks[0]((*tensors, initial, o, final, None, None, cu_seqlens))
        return Forward(o, final, saved if save else [])

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        """See `gdn.backend.Plan.backward`. The states are computed again, not kept."""
        call = _contiguous(call)
        grad_o = grad_o.contiguous()
        grad_final = None if grad_final_state is None else grad_final_state.contiguous()
        factors, matrices, *parallel = saved
        slots, HV, K, V = self.slots, *(self.common[n] for n in ("HV", "K", "V"))
        states, grad_states = (call.q.new_empty((slots, HV, V, K)) for _ in range(2))
        U, R = (call.q.new_empty((slots, HV, V, CHUNK)) for _ in range(2))
        dS = None if call.initial_state is None else torch.empty_like(call.initial_state)
        begins, ends, into = call.initial_state, grad_final, dS
        tensors, cu_seqlens = (call.q, call.k, call.v, factors, matrices), call.cu_seqlens
        going_back = (call.q, call.k, factors, matrices, grad_o)
        if parallel:
            walked, begins = parallel
            own, ends = torch.empty_like(begins), torch.empty_like(begins)
            self.reverse_scan(call, final=False, initial=True, keep=False)(
                (*going_back, None, None, None, own, cu_seqlens)
            )
            self.carry(call, grad_final is not None, dS is not None, reverse=True)(
                (walked, own, grad_final, ends, dS, cu_seqlens)
            )
            into = None
        self.scan(call, o=False, final=False, states=True, transfer=False)(
            (*tensors, begins, None, None, states, U, cu_seqlens)
        )
        self.reverse_scan(call, final=ends is not None, initial=into is not None, keep=True)(
            (*going_back, ends, R, grad_states, into, cu_seqlens)
        )

        dq, dk, dv, dg, dbeta = (torch.empty_like(x) for x in call[:5])
        dG = torch.empty_like(factors[:, :, 0])
        partial = [
            None if x is None else x.new_zeros((slots, HV), dtype=torch.float32)
            for x in (call.A_log, call.dt_bias)
        ]
        programs = slots * self.common["H"]
        self.stage(query_gradients_kernel, programs, self.chunks)(
            (call.q, call.k, factors, matrices, states, U, grad_o, dq, dG, cu_seqlens), call.scale
        )
        self.stage(key_gradients_kernel, programs, self.chunks)(
            (
                call.q, call.k, call.v, call.g, factors, states, grad_states, U, R, grad_o, dG,
                call.A_log, call.dt_bias, dk, dv, dg, dbeta, *partial, cu_seqlens,
            ),
            call.scale,
        )  # fmt: skip
        sums = (
            None if x is None or rows is None else rows.sum(0).to(x.dtype)
            for x, rows in zip((call.A_log, call.dt_bias), partial, strict=True)
        )
        return Gradients(dq, dk, dv, dg, dbeta, dS, *sums)
