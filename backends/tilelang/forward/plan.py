"""Forward: which kernels a kind of call takes, and their buffers."""

from __future__ import annotations

from typing import Any

import torch

from gdn.backend import Forward
from gdn.problem import CHUNK, Call

from ...common.allocation import allocator
from ...common.chunking import piece_length, piece_slots, sm_count
from ..arguments import dtype_name, gate_options, tma_ready
from ..combine_pieces import combine_pieces
from ..compile import compile_together, launchers
from ..memory_rounds import sequence_chunks, sequence_parts
from ..streams import join_side_stream, side_stream
from ..tile.layout import ROWS
from .prepare import PROGRAMS, prepare
from .scan import scan

SEGMENT, SEGMENTS = 32, 4
"""Chunks of a segment at least, and segments at most."""
HALF = 32
"""Chunks of half a piece, at least, where pieces are halved."""


def warpgroups(V: int, walks: int, device: torch.device) -> int:
    """How many warpgroups a program of the scan gets: one where that leaves fewer multiprocessors
    idle."""
    return 2 if V == 128 and 2 * walks > sm_count(device) else 1


def segments(call: Call, walks: int, save: bool) -> list[tuple[int, int]]:
    """First chunk and number of chunks of the parts of every sequence that are coupled while the
    one before is walked: those that backward takes apart, or some where `walks` programs leave
    multiprocessors idle; none where they do not, or the sequences are short."""
    if save and len(sequence_parts(call)) > 1:
        return sequence_parts(call)
    chunks = sequence_chunks(call)
    span = max(SEGMENT, -(-chunks // SEGMENTS))
    packed = call.cu_seqlens is not None
    if packed or span >= chunks or 4 * walks > 3 * sm_count(call.q.device):
        return []
    return [(first, min(span, chunks - first)) for first in range(0, chunks, span)]


def shares(call: Call, chunks: int) -> tuple[int, int]:
    """Programs of `prepare`, and value heads of a q/k head that each takes at a time: all, or as
    many as leave no multiprocessor idle."""
    HV, group = call.v.shape[2], call.v.shape[2] // call.q.shape[2]
    most, taken = PROGRAMS[dtype_name(call.q)] * sm_count(call.q.device), group
    while taken > 1 and (group % taken or chunks * HV < most * taken):
        taken -= 1
    return min(most, chunks * HV // taken), taken


def saved_shapes(call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What forward hands on: of every chunk and q/k head the reciprocal norms of q and k, of every
    value head the inverse that couples its tokens; the states between the parts that backward takes
    apart; and `walked_shapes`."""
    number, H, HV = piece_slots(call, CHUNK), call.q.shape[2], call.v.shape[2]
    apart = len(sequence_parts(call)) - 1
    states = [((apart, *call.state_shape), torch.float32)] if apart else []
    return [
        ((number, H, 2, CHUNK), torch.float32),
        ((number, HV, CHUNK, CHUNK), call.q.dtype),
        *states,
        *walked_shapes(call, True),
    ]


def cut(call: Call, save: bool) -> tuple[int | None, int]:
    """Tokens of a piece if pieces are walked at the same time, and warpgroups of a program of their
    last walk. Long ones are halved: twice as many programs of twice the columns load q, k and the
    matrices half as often. Backward, whose programs have 64 columns, wants them whole."""
    length = piece_length(call, ROWS)
    half = -(-(length or 0) // (2 * CHUNK)) * CHUNK
    if save or call.v.shape[3] == ROWS or half < HALF * CHUNK:
        return length, 1
    return half, 2


def walked_shapes(call: Call, save: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """If pieces are walked at the same time, what each does to a state, and the state that it
    begins with (`carry.py`)."""
    length, _ = cut(call, save)
    if length is None:
        return []
    number, (HV, V), K = piece_slots(call, length), call.v.shape[2:], call.q.shape[3]
    return [((number, HV, rows, K), torch.float32) for rows in (V + K, V)]


class ForwardPass:
    """All that forward calls of one kind (shapes, dtypes, device, options) have in common."""

    def __init__(self, call: Call) -> None:
        K, (HV, V) = call.q.shape[3], call.v.shape[2:]
        self.sequences = call.sequences
        self.cuts = {save: cut(call, save) for save in (False, True)}
        exact = (call.initial_state, call.A_log, call.dt_bias)
        self.casts = any(x is not None and x.dtype != torch.float32 for x in exact)
        self.slots, low, device = piece_slots(call, CHUNK), call.q.dtype, call.q.device
        self.shares = shares(call, self.slots)
        self.new_o = allocator(call.v.shape, low, device)
        self.new_end = allocator(call.state_shape, torch.float32, device)
        self.new_matrices = allocator((self.slots, HV, 2, CHUNK, CHUNK), low, device)
        self.new_walk = allocator((self.slots, HV, 4, CHUNK), torch.float32, device)
        self.new_saved = {
            save: [allocator(*kind, device) for kind in kinds]
            for save, kinds in ((False, walked_shapes(call, False)), (True, saved_shapes(call)))
        }
        shared = {
            "dtype": dtype_name(call.q),
            "offsets": dtype_name(call.cu_seqlens, "int32"),
            "K": K,
            "V": V,
            "varlen": call.cu_seqlens is not None,
        }
        self.prepare: dict[str, Any] = shared | gate_options(call)
        walk = {n: shared[n] for n in ("offsets", "K", "V", "varlen")} | {
            "initial": call.initial_state is not None,
            "final": call.output_final_state,
            "v_first": call.state_v_first,
        }
        common = {"dtype": shared["dtype"], "transfer": False}
        self.segments: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}
        self.walks: dict[bool, list[tuple[Any, dict[str, Any]]]] = {}
        if self.cuts[True][0] is None:
            several = warpgroups(V, self.sequences * HV, device)
            common |= {"warpgroups": several, "cut": False}
            for save, found in self.segments.items():
                number = self.sequences * HV * V // (ROWS * several)
                found += [
                    (first, span, *shares(call, self.sequences * span))
                    for first, span in segments(call, number, save)
                ]
                own = common | ({"final": True} if found else {})  # each hands the next its state
                self.walks[save] = [(scan, walk | own)]
                if found and call.initial_state is None:
                    self.walks[save] += [(scan, walk | own | {"initial": True})]
        else:
            common |= {"warpgroups": 1, "cut": True}
            transfer = walk | common | {"final": True, "transfer": True}
            across = (combine_pieces, walk | {"final": False, "reverse": False})
            for save, (_, several) in self.cuts.items():
                again = walk | common | {"initial": True, "warpgroups": several}
                self.walks[save] = [(scan, transfer), across, (scan, again)]
        self.runs: dict[bool, list[Any]] = {}

    def kernels(self, save: bool) -> list[Any]:
        """The compiled kernels, in the order of their launches."""
        return compile_together((prepare, self.prepare | {"save": save}), *self.walks[save])

    def forward(self, call: Call, save: bool) -> Forward:
        """See `gdn.backend.Plan.forward`."""
        begin, A_log, dt_bias = call.initial_state, call.A_log, call.dt_bias
        if self.casts:
            begin, A_log, dt_bias = (
                None if x is None else x.float() for x in (begin, A_log, dt_bias)
            )
        q, k, v, g, beta = (tma_ready(x) for x in (call.q, call.k, call.v, call.g, call.beta))
        begin, A_log, dt_bias = tma_ready(begin), tma_ready(A_log), tma_ready(dt_bias)
        cu_seqlens = tma_ready(call.cu_seqlens)
        o = self.new_o()
        end = self.new_end() if call.output_final_state else None
        matrices, walk = self.new_matrices(), self.new_walk()
        saved = [new() for new in self.new_saved[save]]
        if save not in self.runs:
            self.runs[save] = launchers(self.kernels(save))
        prepare_chunks, *walks = self.runs[save]
        coupled = (
            q, k, g, beta, A_log, dt_bias, cu_seqlens, matrices, walk,
            *(saved[:2] if save else (None, None)), self.sequences,
        )  # fmt: skip
        tensors, N = (q, k, v, matrices, walk), self.sequences
        if self.segments[save]:
            state, last = begin, self.new_end() if end is None else end
            apart = len(saved) > 2
            for number, (first, span, *share) in enumerate(self.segments[save], 1):
                into = saved[2][number - 1] if apart and number < len(self.segments[save]) else last
                prepare_chunks(*coupled, N * span, first, span, *share, call.scale)
                with side_stream(q.device):
                    run = walks[0 if first == 0 else -1]
                    part = (span * CHUNK, 0, first * CHUNK)
                    run(*tensors, state, cu_seqlens, o, into, N, N, *part)
                state = into
            join_side_stream(q.device)
            return Forward(o, end, saved if save else [])
        prepare_chunks(*coupled, self.slots, 0, self.slots, *self.shares, call.scale)
        length, _ = self.cuts[save]
        if length is None:
            walks[0](*tensors, begin, cu_seqlens, o, end, N, N, q.shape[1], 0, 0)
        else:
            walked, begins = saved[-2:]
            many = (N, walked.shape[0], length)
            walks[0](*tensors, begin, cu_seqlens, o, walked, *many, int(save), 0)
            walks[1](walked, None, begins, begin, None, cu_seqlens, N, q.shape[1], length)
            walks[2](*tensors, begins, cu_seqlens, o, end, *many, 0, 0)
        return Forward(o, end, saved if save else [])
