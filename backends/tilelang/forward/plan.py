"""Which kernels a forward call needs, their buffers, and their launches.

`fused_plan.py` has the calls that one kernel computes. For all others there are three ways to run
`prepare` and `scan`, chosen from shapes alone:

- whole sequences: `prepare` of all chunks, then one scan;
- segments: every sequence is divided into segments that are scanned one after another, while
  `prepare` of the next segment runs beside the scan of this one;
- pieces: sequences are cut into pieces that are scanned in parallel, by a transfer scan,
  `combine_pieces` and a final scan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Forward
from gdn.exchange import Exchange
from gdn.problem import CHUNK, Call

from ...common.allocation import allocator
from ...common.chunking import piece_slots, sm_count
from ..arguments import (
    channel_options,
    clear_tail_options,
    dtype_name,
    gate_options,
    tma_ready,
    token_ready,
)
from ..kernels import Job, clear_tail, prepare, prepare_channels, scan
from ..launch import launchers
from ..memory_rounds import sequence_chunks, stretches
from ..streams import join_side_stream, side_stream
from ..tile.layout import BLOCKS_PER_SM, ROWS, factor_rows
from ..tile.pool_kind import NO_TABLES, PoolKind
from .fused_plan import FusedPass
from .pieces import choose_pieces, piece_jobs, piece_shapes, scan_pieces

MIN_SEGMENT_CHUNKS, MAX_SEGMENTS = 32, 4


def choose_warpgroups(V: int, scans: int, device: torch.device) -> int:
    """Consumer warpgroups of a thread block of `scan`: 1 where 2 would leave more SMs idle. scans:
    sequences times value heads."""
    return 2 if V == 128 and 2 * scans > sm_count(device) else 1


def choose_segments(call: Call, scans: int, save: bool) -> list[tuple[int, int]]:
    """First chunk and number of chunks of each segment; an empty list means whole sequences.

    The stretches of backward's memory rounds become segments, since forward saves the states
    between them. Else there are segments where `scans` thread blocks leave a quarter of the SMs
    idle and sequences are long.
    """
    if save and len(stretches(call)) > 1:
        return stretches(call)
    chunks = sequence_chunks(call)
    span = max(MIN_SEGMENT_CHUNKS, -(-chunks // MAX_SEGMENTS))
    packed = call.cu_seqlens is not None
    if packed or span >= chunks or 4 * scans > 3 * sm_count(call.q.device):
        return []
    return [(first, min(span, chunks - first)) for first in range(0, chunks, span)]


def choose_prepare_grid(call: Call, chunks: int) -> tuple[int, int]:
    """Thread blocks of `prepare`, and how many value heads of a q/k head each takes in
    turn: as many as possible while all SMs stay full."""
    HV, group = call.v.shape[2], call.v.shape[2] // call.q.shape[2]
    most = BLOCKS_PER_SM * sm_count(call.q.device)
    heads_at_once = group
    while heads_at_once > 1 and (group % heads_at_once or chunks * HV < most * heads_at_once):
        heads_at_once -= 1
    return min(most, chunks * HV // heads_at_once), heads_at_once


def prepare_grid(call: Call, chunks: int) -> tuple[int, ...]:
    """`choose_prepare_grid`; nothing for `prepare_channels`, which takes one item a block."""
    return () if call.per_channel else choose_prepare_grid(call, chunks)


def saved_shapes(call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What forward saves for backward: the norms rq and rk of every chunk and q/k head, and A of
    every chunk and value head, or P and A with a decay per channel; the states between the
    stretches of memory rounds, if there are several; and `piece_shapes`."""
    slots, H, HV = piece_slots(call, CHUNK), call.q.shape[2], call.v.shape[2]
    if call.per_channel:
        matrices: list[Any] = [((slots, HV, 2, CHUNK, CHUNK), call.q.dtype)]
    else:
        matrices = [
            ((slots, H, 2, CHUNK), torch.float32), ((slots, HV, CHUNK, CHUNK), call.q.dtype)
        ]  # fmt: skip
    boundaries = len(stretches(call)) - 1
    states = [((boundaries, *call.state_shape), torch.float32)] if boundaries else []
    return [*matrices, *states, *piece_shapes(call, True)]


class ForwardPass:
    """What all forward calls of one kind (shapes, dtypes, device, options) have in common. With
    save, a call saves tensors for backward."""

    def __init__(self, call: Call, pool: PoolKind | None = None, clears_tail: bool = True) -> None:
        """pool: of a prefill on a pool; clears_tail: o of tokens past the last sequence is zero."""
        K, (HV, V) = call.q.shape[3], call.v.shape[2:]
        self.sequences = call.sequences
        self.pieces = {save: choose_pieces(call, save) for save in (False, True)}
        exact = (call.A_log, call.dt_bias)
        self.casts = any(x is not None and x.dtype != torch.float32 for x in exact)
        self.slots, low, device = piece_slots(call, CHUNK), call.q.dtype, call.q.device
        self.prepare_grid = prepare_grid(call, self.slots)
        self.new_o = allocator(call.v.shape, low, device)
        self.new_state = allocator(call.state_shape, torch.float32, device)
        self.new_P_A_v = allocator((self.slots, HV, 2, CHUNK, CHUNK), low, device)
        channels, f32 = call.per_channel, torch.float32
        rows = factor_rows(K, channels)
        self.new_scan_factors = allocator((self.slots, HV, rows, CHUNK), f32, device)
        self.new_decayed_rows: Any = lambda: None
        if channels:
            self.new_decayed_rows = allocator((self.slots, HV, 3, CHUNK, K), low, device)
        self.new_saved = {
            save: [allocator(*kind, device) for kind in kinds]
            for save, kinds in ((False, piece_shapes(call, False)), (True, saved_shapes(call)))
        }
        shape = {
            "offsets": dtype_name(call.cu_seqlens, "int32"), "K": K, "V": V,
            "varlen": call.cu_seqlens is not None,
        }  # fmt: skip
        dtype = dtype_name(call.q)
        self.prepare_options: dict[str, Any] = shape | {"dtype": dtype} | gate_options(call)
        self.channels, self.matrices = channels, 1 if channels else 2  # that forward saves
        if channels:
            self.prepare_options |= channel_options(call) | {"rows_alone": False}
        states: dict[str, Any] = {
            "initial": call.initial_state is not None or pool is not None,
            "final": call.output_final_state or pool is not None,
            "v_first": call.state_v_first,
        }
        states["pool"] = pool
        self.fused = {
            save: FusedPass.of(call, self.prepare_options | states, save) for save in (False, True)
        }
        if pool is not None and call.cu_seqlens is not None:
            self.prepare_options["unchecked"] = True
        self.segments: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}
        self.scan_jobs: dict[bool, list[Job]] = {}
        options = shape | states | {"dtype": dtype, "transfer": False, "channels": channels}
        if self.pieces[True][0] is None:
            warpgroups = choose_warpgroups(V, self.sequences * HV, device)
            options |= {"warpgroups": warpgroups, "cut": False}
            scans = self.sequences * HV * V // (ROWS * warpgroups)
            for save, segments in self.segments.items():
                segments += [
                    (first, span, *prepare_grid(call, self.sequences * span))
                    for first, span in choose_segments(call, scans, save)
                    if pool is None  # the state between two segments has no place in a pool
                ]
                # each segment but the first starts from the final state of the one before
                first_scan = options | ({"final": True} if segments else {})
                self.scan_jobs[save] = [(scan, first_scan)]
                if segments and call.initial_state is None:
                    self.scan_jobs[save] += [(scan, first_scan | {"initial": True})]
        else:
            for save, (_, warpgroups) in self.pieces.items():
                self.scan_jobs[save] = piece_jobs(call, options, warpgroups, save)
        self.clear_jobs: dict[bool, list[Job]] = {False: [], True: []}
        if call.cu_seqlens is not None and clears_tail:
            clear = clear_tail_options(call, backward=False)
            for save, fused in self.fused.items():
                counter = fused is not None and fused.counts
                self.clear_jobs[save].append((clear_tail, clear | {"counter": counter}))
        self.launchers: dict[bool, tuple[list[Any], Any]] = {}

    def jobs(self, save: bool) -> list[Job]:
        """The kernels in the order of their launches, without `clear_tail`."""
        fused = self.fused[save]
        if fused:
            return fused.jobs
        options = self.prepare_options | {"save": save}
        if self.channels:
            return [(prepare_channels, options), *self.scan_jobs[save]]
        del options["V"]  # one kernel for all
        return [(prepare, options), *self.scan_jobs[save]]

    def all_jobs(self, save: bool) -> list[Job]:
        """`jobs`, and `clear_tail` at the end if it is needed."""
        return [*self.jobs(save), *self.clear_jobs[save]]

    def _launchers(self, save: bool) -> tuple[list[Any], Any]:
        """The functions that launch `jobs`, and the one of `clear_tail` or None."""
        found = launchers(self.all_jobs(save))
        self.launchers[save] = (found[:-1], found[-1]) if self.clear_jobs[save] else (found, None)
        return self.launchers[save]

    def forward(self, call: Call, save: bool, exchange: Exchange | None = None) -> Forward:
        """See `gdn.backend.Plan.forward`, with exchange `gdn.exchange.ExchangingPlan`."""
        final = self.new_state() if call.output_final_state else None
        o = self.new_o()
        saved = self.run(call, save, call.initial_state, o, final, NO_TABLES, exchange)
        return Forward(o, final, saved)

    def run(
        self, call: Call, save: bool, initial: Tensor | None, o: Tensor, final: Tensor | None,
        tables: tuple[Any, ...], exchange: Exchange | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Fill o and final, and return what backward needs (save). tables: those of slots and
        checkpoints in prefill on a pool. The pool is then both initial and final."""
        A_log, dt_bias = call.A_log, call.dt_bias
        if self.casts:
            A_log, dt_bias = (None if x is None else x.float() for x in (A_log, dt_bias))
        q, k, v, beta = (token_ready(x) for x in (call.q, call.k, call.v, call.beta))
        g = tma_ready(call.g) if self.channels else token_ready(call.g)
        A_log, dt_bias = tma_ready(A_log), tma_ready(dt_bias)
        cu_seqlens = tma_ready(call.cu_seqlens)
        if call.initial_state is not None:  # else it may be a pool, in a dtype of its own
            initial = tma_ready(call.initial_state.float())
        launch, run_clear = self.launchers.get(save) or self._launchers(save)
        fused = self.fused[save]
        counter = fused.new_counter() if fused else None
        cleared = counter if fused and fused.counts else None
        if run_clear is not None:
            run_clear(o, None, None, None, None, cu_seqlens, cleared)
        elif cleared is not None:
            cleared.zero_()
        saved = [new() for new in self.new_saved[save]] if save or not fused else []
        if fused:
            gates = (g, beta, A_log, dt_bias)
            fused.run(
                launch, q, k, v, gates, initial, cu_seqlens, o, final, tables, counter, call.scale,
                saved,
            )  # fmt: skip
            return saved
        run_prepare, *run_scans = launch
        P_A_v, scan_factors = self.new_P_A_v(), self.new_scan_factors()
        decayed_rows = self.new_decayed_rows()
        matrices, others = saved[: self.matrices], saved[self.matrices :]
        prepared = (
            q, k, g, beta, A_log, dt_bias, cu_seqlens, P_A_v, scan_factors,
            *((decayed_rows,) if self.channels else ()),
            *(matrices if save else [None] * self.matrices),
            *((None,) if self.channels else ()), self.sequences,
        )  # fmt: skip
        inputs = (q, k, v, P_A_v, scan_factors, decayed_rows)
        N, T = self.sequences, q.shape[1]
        if self.segments[save]:
            # the states between stretches, if backward has several, are final states of segments
            between = others[0] if others else None
            self._run_segments(
                save, call.scale, run_prepare, run_scans, prepared, inputs, initial, between,
                cu_seqlens, o, self.new_state() if final is None else final,
            )  # fmt: skip
            return saved if save else []
        run_prepare(*prepared, self.slots, 0, self.slots, *self.prepare_grid, call.scale)
        length, _ = self.pieces[save]
        if length is None:
            run_scans[0](*inputs, initial, cu_seqlens, o, final, None, *tables, N, N, T, 0, 0)
        else:
            ends = (o, final, tables, (N, T, length), save, exchange)
            decays = (scan_factors,) if self.channels else ()
            searched = (k, g, beta, A_log, dt_bias, cu_seqlens, *decays)
            scan_pieces(run_scans, inputs, searched, initial, cu_seqlens, saved[-2:], *ends)
        return saved if save else []

    def _run_segments(
        self, save: bool, scale: float, run_prepare: Any, run_scans: list[Any],
        prepared: tuple[Any, ...], inputs: tuple[Any, ...], initial: Tensor | None,
        between: Tensor | None, cu_seqlens: Tensor | None, o: Tensor, final: Tensor,
    ) -> None:  # fmt: skip
        """`prepare` of every segment on this stream, and its scan on the second one."""
        segments, N, state = self.segments[save], self.sequences, initial
        for number, (first, span, *grid) in enumerate(segments):
            into = final if between is None or number == len(segments) - 1 else between[number]
            run_prepare(*prepared, N * span, first, span, *grid, scale)
            with side_stream(o.device):
                run = run_scans[0 if first == 0 else -1]
                tokens = (span * CHUNK, 0, first * CHUNK)
                run(*inputs, state, cu_seqlens, o, into, None, *NO_TABLES, N, N, *tokens)
            state = into
        join_side_stream(o.device)
