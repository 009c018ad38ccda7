"""Backward: which kernels a call launches, and with what static options."""

from __future__ import annotations

from typing import Any

from gdn.problem import CHUNK, Call

from ...common.chunking import piece_slots, sm_count
from ..arguments import (
    channel_options,
    clear_tail_options,
    dtype_name,
    gate_options,
    search_job,
)
from ..kernels import (
    Job,
    channel_gradients,
    clear_tail,
    combine_pieces,
    gate_sums,
    gradients,
    prepare_channels,
    recompute_states,
    reverse_gradients,
    reverse_scan,
)
from ..memory_rounds import joins_gradients, memory_rounds, stretch_length, stretches
from ..piece_lengths import saved_length

MAX_CHUNKS = 10
"""Pairs of a chunk and a q/k head that a thread block of `gradients` takes, at most."""


class BackwardJobs:
    """What all backward calls of one kind (shapes, dtypes, device, options) have in common."""

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
        self.length = saved_length(call)  # tokens of a piece; None: sequences are not cut
        self.cut = self.length is not None
        self.pieces = self.sequences if self.length is None else piece_slots(call, self.length)
        self.joined = joins_gradients(call)
        self.rounds = memory_rounds(call)
        self.stretch = stretch_length(call)  # tokens of a stretch; None: parts are not divided
        self.split = len(stretches(call)) > 1  # whether forward saved states inside of sequences
        self.round_slots = max(r.slots for r in self.rounds)
        # As many thread blocks as SMs, or a multiple: otherwise some SMs would have more to do.
        work, sms = self.round_slots * H, sm_count(call.q.device)
        self.thread_blocks = min(work, sms * max(1, -(-work // (sms * MAX_CHUNKS))))
        self.offsets = dtype_name(call.cu_seqlens, "int32")
        self.v_first = call.state_v_first
        self.scan_options = self.shape | {
            # the states between pieces are always [V, K]
            "offsets": self.offsets, "v_first": self.cut or self.v_first, "cut": self.cut,
            "channels": call.per_channel,
        }  # fmt: skip
        self.gate_options, self.channels = gate_options(call), call.per_channel
        self.search = search_job(call, reverse=True)  # if sequences are cut
        if self.channels:
            self.gate_options |= channel_options(call)
        self.clear_jobs: list[Job] = []
        if call.cu_seqlens is not None:
            self.clear_jobs = [(clear_tail, clear_tail_options(call, backward=True))]

    def jobs(self, initial: bool, final: bool) -> list[Job]:
        """The kernels in the order of their launches; `clear_tail` last. initial: whether
        the call has an initial state; final: whether the final state has a gradient."""
        if self.split:  # scans start from saved states, and from gradients of the round before
            initial = final = True
        if self.channels:
            prepare = {name: x for name, x in self.shape.items() if name != "group"} | {
                "offsets": self.offsets, "save": False, "rows_alone": True,
            }  # fmt: skip
            first: Job = (prepare_channels, self.gate_options | prepare)
            last: Job = (channel_gradients, self.shape | self.gate_options)
        else:
            options = {name: x for name, x in self.gate_options.items() if name != "l2"}
            first = (gate_sums, options | {"offsets": self.offsets, "varlen": self.shape["varlen"]})
            last = (gradients, self.shape | self.gate_options)
        scan = self.scan_options
        ends = {"final": self.cut or final, "initial": not self.cut and initial}
        whole_scan: list[Job] = [(reverse_scan, scan | ends | {"outputs": True})]
        if self.joined:
            shape = {name: self.shape[name] for name in ("dtype", "K", "V")}
            ends |= {"v_first": scan["v_first"], "cut": self.cut}
            whole_scan, last = [], (reverse_gradients, shape | self.gate_options | ends)
        if not self.cut:
            stretched = self.stretch is not None
            return [
                first,
                (recompute_states, scan | {"initial": initial, "cut": stretched}),
                *whole_scan,
                last,
                *self.clear_jobs,
            ]
        combine = {name: self.shape[name] for name in ("K", "V", "varlen")} | {
            "offsets": self.offsets, "v_first": self.v_first, "reverse": True,
            "forgetting": False,
            # backward begins with the final state
            "initial": final, "final": initial,
        }  # fmt: skip
        from_zero = {"final": False, "initial": True, "outputs": False, "forgetting": True}
        return [
            first,
            (recompute_states, scan | {"initial": True}),
            self.search,
            (reverse_scan, scan | from_zero),
            (combine_pieces, combine),
            *whole_scan,
            last,
            *self.clear_jobs,
        ]
