"""Backward: its stages in order, and the buffers between them.

Forward's states are computed again (`states.py`) while the gradient of the state goes back
(`reverse_scan.py`); all else follows from both, chunk by chunk (`gradients.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Gradients
from gdn.cut import parallel_length, pieces, processors
from gdn.problem import CHUNK, Call

from .carry import carry
from .constants import ROWS
from .forward import gate_options, ready
from .gradients import gradients
from .launch import beside, dtype_name, entries, rejoin, together
from .reverse_scan import reverse_scan
from .states import states

TAKEN = 4
"""Chunks that a program of `gradients` takes at most."""


class Backward:
    """All that backward calls of one kind (shapes, dtypes, device, options) have in common."""

    def __init__(self, call: Call) -> None:
        H, K = call.q.shape[2:]
        HV, V = call.v.shape[2:]
        self.slots, self.sequences = pieces(call, CHUNK), call.sequences
        self.shape: dict[str, Any] = {
            "dtype": dtype_name(call.q),
            "K": K,
            "V": V,
            "group": HV // H,
            "varlen": call.cu_seqlens is not None,
        }
        self.length = parallel_length(call, ROWS)
        self.pieces = self.sequences if self.length is None else pieces(call, self.length)
        self.offsets, cut = dtype_name(call.cu_seqlens, "int32"), self.length is not None
        self.v_first = call.state_v_first
        # as many as multiprocessors, or more, lest the slowest of these has too much left to do
        work = self.slots * H
        self.programs = max(min(work, processors(call.q.device)), -(-work // TAKEN))
        self.scan = self.shape | {
            "offsets": self.offsets, "v_first": cut or call.state_v_first, "cut": cut,
        }  # fmt: skip
        self.options = gate_options(call)
        self.runs: dict[tuple[bool, bool], list[Any]] = {}

    def kernels(self, initial: bool, final: bool) -> list[Any]:
        """The compiled stages. initial: there is a first state; final: the last has a gradient."""
        last = (gradients, self.shape | self.options)
        if self.length is None:
            return together(
                (states, self.scan | {"initial": initial}),
                (reverse_scan, self.scan | {"final": final, "initial": initial, "keep": True}),
                last,
            )
        across = {name: self.shape[name] for name in ("K", "V", "varlen")} | {
            "offsets": self.offsets, "v_first": self.v_first, "reverse": True,
            "initial": final, "final": initial,
        }  # fmt: skip
        return together(
            (states, self.scan | {"initial": True}),
            (reverse_scan, self.scan | {"final": False, "initial": True, "keep": False}),
            (carry, across),
            (reverse_scan, self.scan | {"final": True, "initial": False, "keep": True}),
            last,
        )

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        """See `gdn.backend.Backend.backward`."""
        q, k, v, g, beta, begin, A_log, dt_bias = (ready(x) for x in call.differentiable)
        do, end = ready(grad_o), ready(grad_final_state)
        factors, norms, inverse, *walked = saved
        (HV, V), K, cu_seqlens = v.shape[2:], q.shape[3], ready(call.cu_seqlens)
        kind = begin is not None, end is not None
        if kind not in self.runs:
            self.runs[kind] = entries(self.kernels(*kind))
        walk, *walks_back, finish = self.runs[kind]

        S, dS = (q.new_empty((self.slots, HV, V, K)) for _ in range(2))
        U = q.new_empty((self.slots, HV, V, CHUNK))
        dq, dk, dv, dg, dbeta = (torch.empty_like(x) for x in (q, k, v, g, beta))
        first = None if begin is None else torch.empty_like(begin, dtype=torch.float32)
        spans = None
        if cu_seqlens is not None:
            spans = torch.zeros((self.slots, 2), dtype=torch.int32, device=q.device)
        partial = [
            None if x is None else x.new_zeros((self.slots, HV), dtype=torch.float32)
            for x in (A_log, dt_bias)
        ]
        begin, A_log, dt_bias = (None if x is None else x.float() for x in (begin, A_log, dt_bias))

        many = (self.sequences, self.pieces, self.length or 0)
        with beside(q.device):
            first_states = walked[1] if walked else begin
            walk(k, v, factors, norms, inverse, first_states, cu_seqlens, S, U, spans, *many)
        chunks = (q, k, do, factors, norms, inverse)
        if walked:
            own, ends = (torch.empty_like(walked[1]) for _ in range(2))
            walks_back[0](*chunks, None, cu_seqlens, None, None, own, call.scale, *many)
            walks_back[1](
                walked[0], own, ends, end, first, cu_seqlens, self.sequences, q.shape[1],
                self.length,
            )  # fmt: skip
            walks_back[2](*chunks, ends, cu_seqlens, dS, dv, None, call.scale, *many)
        else:
            walks_back[0](*chunks, end, cu_seqlens, dS, dv, first, call.scale, *many)
        rejoin(q.device)
        finish(
            q, k, v, g, A_log, dt_bias, do, factors, norms, U, S, dS, spans,
            dq, dk, dv, dg, dbeta, *partial, call.scale, self.programs,
        )  # fmt: skip
        state, dA_log, ddt_bias = (
            None if x is None or like is None else x.to(like.dtype)
            for x, like in (
                (first, call.initial_state),
                (None if partial[0] is None else partial[0].sum(0), call.A_log),
                (None if partial[1] is None else partial[1].sum(0), call.dt_bias),
            )
        )
        return Gradients(dq, dk, dv, dg, dbeta, state, dA_log, ddt_bias)
