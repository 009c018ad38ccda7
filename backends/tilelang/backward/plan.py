"""Backward: its stages in order, and the buffers between them.

Forward's states are computed again (`states.py`) while the gradient of the state goes back
(`reverse_scan.py`); all else follows from both, chunk by chunk (`gradients.py`). Where the states
would take much memory, that happens in rounds (`rounds.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Gradients
from gdn.problem import CHUNK, Call

from ...common.chunking import piece_length, piece_slots, sm_count
from ..arguments import dtype_name, gate_options, tma_ready
from ..combine_pieces import combine_pieces
from ..compile import compile_together, launchers
from ..memory_rounds import MemoryRound, memory_rounds, sequence_parts
from ..streams import join_side_stream, side_stream
from ..tile.layout import ROWS
from .gate_sums import gate_sums
from .gradients import gradients
from .recompute_states import recompute_states
from .reverse_scan import reverse_scan

TAKEN = 10
"""Chunks that a program of `gradients` takes at most."""


class BackwardPass:
    """All that backward calls of one kind (shapes, dtypes, device, options) have in common."""

    def __init__(self, call: Call) -> None:
        H, K = call.q.shape[2:]
        HV, V = call.v.shape[2:]
        self.slots, self.sequences = piece_slots(call, CHUNK), call.sequences
        self.shape: dict[str, Any] = {
            "dtype": dtype_name(call.q),
            "K": K,
            "V": V,
            "group": HV // H,
            "varlen": call.cu_seqlens is not None,
        }
        self.length = piece_length(call, ROWS)
        self.pieces = self.sequences if self.length is None else piece_slots(call, self.length)
        self.offsets, cut = dtype_name(call.cu_seqlens, "int32"), self.length is not None
        self.v_first = call.state_v_first
        self.rounds, self.parted = memory_rounds(call), len(sequence_parts(call)) > 1
        self.most = max(r.slots for r in self.rounds)
        # as many as multiprocessors, or a multiple, lest the slowest of these has too much to do
        work, available = self.most * H, sm_count(call.q.device)
        self.programs = min(work, available * max(1, -(-work // (available * TAKEN))))
        self.scan = self.shape | {
            "offsets": self.offsets, "v_first": cut or call.state_v_first, "cut": cut,
        }  # fmt: skip
        self.options = gate_options(call)
        self.runs: dict[tuple[bool, bool], list[Any]] = {}

    def kernels(self, initial: bool, final: bool) -> list[Any]:
        """The compiled stages. initial: there is a first state; final: the last has a gradient."""
        if self.parted:
            initial = final = True
        options = {name: x for name, x in self.options.items() if name != "l2"}
        first = (gate_sums, options | {"offsets": self.offsets, "varlen": self.shape["varlen"]})
        last = (gradients, self.shape | self.options)
        if self.length is None:
            return compile_together(
                first,
                (recompute_states, self.scan | {"initial": initial}),
                (reverse_scan, self.scan | {"final": final, "initial": initial, "keep": True}),
                last,
            )
        across = {name: self.shape[name] for name in ("K", "V", "varlen")} | {
            "offsets": self.offsets, "v_first": self.v_first, "reverse": True,
            "initial": final, "final": initial,
        }  # fmt: skip
        return compile_together(
            first,
            (recompute_states, self.scan | {"initial": True}),
            (reverse_scan, self.scan | {"final": False, "initial": True, "keep": False}),
            (combine_pieces, across),
            (reverse_scan, self.scan | {"final": True, "initial": False, "keep": True}),
            last,
        )

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        """See `gdn.backend.Plan.backward`."""
        q, k, v, g, beta, begin, A_log, dt_bias = (tma_ready(x) for x in call.differentiable)
        do, end, cu_seqlens = (
            tma_ready(grad_o),
            tma_ready(grad_final_state),
            tma_ready(call.cu_seqlens),
        )
        kind = begin is not None, end is not None
        if kind not in self.runs:
            self.runs[kind] = launchers(self.kernels(*kind))

        grads = [torch.empty_like(x) for x in (q, k, v, g, beta)]
        (HV, V), K, new = v.shape[2:], q.shape[3], q.new_empty
        between = [
            *(new((self.most, HV, V, columns)) for columns in (K, K, CHUNK)),
            new((self.most, HV, V // ROWS, CHUNK), dtype=torch.float32),
        ]
        spans = None
        if cu_seqlens is not None:
            spans = new((self.slots, 2), dtype=torch.int32)
        factors = new((self.slots, HV, 2, CHUNK), dtype=torch.float32)
        partial = [
            None if x is None else x.new_zeros((self.slots, HV), dtype=torch.float32)
            for x in (A_log, dt_bias)
        ]
        begin, A_log, dt_bias = (None if x is None else x.float() for x in (begin, A_log, dt_bias))
        first = None if begin is None else torch.empty_like(begin)
        if self.parted:  # the parts of a sequence hand each other states and their gradients
            zeros = factors.new_zeros(call.state_shape)
            begin, end = (zeros if x is None else x for x in (begin, end))
            first, handed = torch.empty_like(begin), torch.empty_like(begin[:1])

        sum_gates, *kernels = self.runs[kind]
        sum_gates(g, beta, A_log, dt_bias, cu_seqlens, factors, spans, self.sequences)
        for r in self.rounds:
            states = [r.of_states(x) for x in (begin, end, first)]
            if r.start > 0:
                states[0], states[2] = saved[2][r.part - 1, r.first : r.last], handed
            if r.stop < r.chunks:
                states[1] = handed
            self.take(
                r, kernels, [r.of_tokens(x) for x in (q, k, v, g, do, *grads)],
                [r.of_slots(x) for x in (factors, *saved[:2], *partial)], saved[2:], states,
                [r.of_work(x) for x in between], (A_log, dt_bias), cu_seqlens, spans, call.scale,
            )  # fmt: skip
        state, dA_log, ddt_bias = (
            None if x is None or like is None else x.to(like.dtype)
            for x, like in (
                (first, call.initial_state),
                (None if partial[0] is None else partial[0].sum(0), call.A_log),
                (None if partial[1] is None else partial[1].sum(0), call.dt_bias),
            )
        )
        dq, dk, dv, dg, dbeta = grads
        return Gradients(dq, dk, dv, dg, dbeta, state, dA_log, ddt_bias)

    def take(
        self, r: MemoryRound, kernels: list[Any], tokens: list[Tensor], slots: list[Any],
        walked: list[Tensor], states: list[Any], between: list[Tensor], gate: tuple[Any, Any],
        cu_seqlens: Tensor | None, spans: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        """One round."""
        walk, *walks_back, finish = kernels
        q, k, v, g, do, dq, dk, dv, dg, dbeta = tokens
        factors, norms, inverse, *partial = slots
        (begin, end, first), (S, dS, U, given) = states, between
        N, cut = r.last - r.first, self.length is not None
        many = (N, self.pieces if cut else N, self.length or 0)
        with side_stream(q.device):
            coupled = (factors, norms, inverse, walked[1] if cut else begin, cu_seqlens)
            walk(k, v, *coupled, S, U, *many)
        chunks = (q, k, v, do, factors, norms, inverse)
        keep = (cu_seqlens, dS, dv, given)
        if cut:
            own, ends = (torch.empty_like(walked[1]) for _ in range(2))
            nothing = (None, None, None)
            walks_back[0](*chunks, None, cu_seqlens, *nothing, own, scale, *many)
            walks_back[1](walked[0], own, ends, end, first, cu_seqlens, N, q.shape[1], self.length)
            walks_back[2](*chunks, ends, *keep, None, scale, *many)
        else:
            walks_back[0](*chunks, end, *keep, first, scale, *many)
        join_side_stream(q.device)
        finish(
            q, k, g, *gate, do, factors, norms, given, U, S, dS, spans,
            dq, dk, dv, dg, dbeta, *partial, scale, self.programs,
        )  # fmt: skip
