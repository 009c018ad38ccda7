"""Backward: the order of its kernels, and the buffers between them.

    gate_sums          G and beta of all chunks, once (`prepare_channels`: see below)
    recompute_states   S before every chunk, and U    } at the same time, on two streams
    reverse_scan       dS after every chunk, and R    }
    gradients          all other gradients, from these

Where `joins_gradients` says so, reverse_gradients takes the place of gradients and of the
reverse_scan before it, after recompute_states: dS and R do not go through memory.

All but gate_sums run once a memory round, since S, dS and U take most of backward's memory
(`memory_rounds.py`). Where a round has stretches, recompute_states scans them in parallel, from the
states that forward saved between them, in what SMs reverse_scan leaves. If forward cut sequences
into pieces, there is one round, and reverse_scan runs twice: over the chunks that matter before
their piece (`forward/first_chunks.py`), and, after `combine_pieces.py`, over all. With a decay per
channel, `prepare_channels` takes the place of gate_sums, in every round, and `channel_gradients`
that of gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Gradients
from gdn.exchange import Exchange, PieceMaps
from gdn.problem import CHUNK, Call

from ..arguments import tma_ready, token_ready
from ..launch import launchers
from ..memory_rounds import MemoryRound
from ..streams import join_side_stream, side_stream
from ..tile.layout import ROWS
from ..tile.pool_kind import NO_TABLES, slot_tables
from .buffers import Chunks, Common, Scratch, States, Tokens
from .factors import rows_of_factors
from .jobs import BackwardJobs


class BackwardPass(BackwardJobs):
    """What all backward calls of one kind have in common, and how one runs."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.launchers: dict[tuple[bool, bool], list[Any]] = {}

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None,
        exchange: Exchange | None = None,
    ) -> Gradients:  # fmt: skip
        """See `gdn.backend.Plan.backward`, with exchange `gdn.exchange.ExchangingPlan`. saved: see
        `saved_shapes` in `forward/plan.py`."""
        q, k, v, beta = (token_ready(x) for x in (call.q, call.k, call.v, call.beta))
        g = tma_ready(call.g) if self.channels else token_ready(call.g)
        begin, A_log, dt_bias = (tma_ready(x) for x in call.differentiable[5:])
        do, d_end, cu_seqlens = (tma_ready(x) for x in (grad_o, grad_final_state, call.cu_seqlens))
        kind = begin is not None, d_end is not None or exchange is not None
        if kind not in self.launchers:
            self.launchers[kind] = launchers(self.jobs(*kind))
        launch_first, *launch_round = self.launchers[kind]

        # === buffers ===
        dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
        if cu_seqlens is not None:
            launch_round.pop()(dv, dq, dk, dg.flatten(2), dbeta, cu_seqlens, None)
        (HV, V), K, new = v.shape[2:], q.shape[3], q.new_empty
        rows = self.round_slots, HV, V
        scaled_slots = self.round_slots if q.dtype == torch.float16 else 0
        scratch = Scratch(
            S=new((*rows, K)),
            dS=None if self.joined else new((*rows, K)),
            U=new((*rows, CHUNK)),
            rowsum_RV=None
            if self.joined
            else new((self.round_slots, HV, V // ROWS, CHUNK), dtype=torch.float32),
            row_scales=new((scaled_slots, HV, V // ROWS, ROWS), dtype=torch.float32),
            decayed_rows=new((*rows[:2], 3, CHUNK, K)) if self.channels else None,
            factors=new((*rows[:2], rows_of_factors(K, True), CHUNK), dtype=torch.float32)
            if self.channels
            else None,
        )
        chunk_spans = None
        if cu_seqlens is not None:
            chunk_spans = new((self.slots, 2), dtype=torch.int32)
        G_beta = None
        if not self.channels:
            G_beta = new((self.slots, HV, 2, CHUNK), dtype=torch.float32)
        # zeros, since nothing is written for unused slots
        dA_log, ddt_bias = (
            None if x is None else x.new_zeros((self.slots, HV, *per_head), dtype=torch.float32)
            for x, per_head in ((A_log, ()), (dt_bias, (K,) if self.channels else ()))
        )
        begin, A_log, dt_bias = (None if x is None else x.float() for x in (begin, A_log, dt_bias))
        d_begin = None if begin is None else torch.empty_like(begin)
        if self.split:
            zeros = new(call.state_shape, dtype=torch.float32).zero_()
            begin, d_end = (zeros if x is None else x for x in (begin, d_end))
            d_begin, d_between = torch.empty_like(begin), torch.empty_like(begin[:1])

        # === kernels ===
        if self.channels:
            norms, (A, *states_saved) = None, saved
        else:
            norms, A, *states_saved = saved
            gates = (g, beta, A_log, dt_bias)
            launch_first(*gates, cu_seqlens, G_beta, chunk_spans, self.sequences)
        common = Common(A_log, dt_bias, cu_seqlens, chunk_spans, call.scale)
        for r in self.rounds:
            tokens = Tokens(*map(r.of_tokens, (q, k, v, g, do, dq, dk, dv, dg, dbeta, beta)))
            chunks = Chunks(*map(r.of_slots, (G_beta, norms, A, dA_log, ddt_bias)))
            states = States(*map(r.of_states, (begin, d_end, d_begin)))
            if r.start > 0:  # forward saved the state between two parts of a sequence
                part_begin = states_saved[0][r.stretch - 1, r.first : r.last]
                states = states._replace(begin=part_begin, d_begin=d_between)
            if r.stop < r.chunks:  # the round before wrote the gradient of the state there
                states = states._replace(d_end=d_between)
            buffers = Scratch(*map(r.of_work, scratch))
            if self.channels:
                launch_first(
                    tokens.q, tokens.k, tokens.g, tokens.beta, A_log, dt_bias, cu_seqlens, None,
                    buffers.factors, buffers.decayed_rows, None, chunk_spans, r.last - r.first,
                    r.slots, 0, r.slots, call.scale,
                )  # fmt: skip
            self._run_round(
                launch_round, r, tokens, chunks, states, buffers, states_saved, common, exchange
            )

        # === sums and dtypes ===
        d_initial_state, dA_log, ddt_bias = (
            None if x is None or like is None else x.to(like.dtype)
            for x, like in (
                (d_begin, call.initial_state),
                (None if dA_log is None else dA_log.sum(0), call.A_log),
                (None if ddt_bias is None else ddt_bias.sum(0), call.dt_bias),
            )
        )
        return Gradients(dq, dk, dv, dg, dbeta, d_initial_state, dA_log, ddt_bias)

    def _run_round(
        self, launch: list[Any], r: MemoryRound, tokens: Tokens, chunks: Chunks, states: States,
        scratch: Scratch, states_saved: list[Tensor], common: Common, exchange: Exchange | None,
    ) -> None:  # fmt: skip
        """Launch the kernels of a round. states_saved: the states between stretches; if sequences
        are cut, the transfer matrices of all pieces and the states before them."""
        launch_states, *launch_reverse, launch_gradients = launch
        q, k, v, g, do, dq, dk, dv, dg, dbeta, beta = tokens
        G_beta, norms, A, dA_log, ddt_bias = chunks
        A_log, dt_bias, cu_seqlens, chunk_spans, scale = common
        S, dS, U, rowsum_RV, scales, *decayed = scratch
        row_scales = scales if q.dtype == torch.float16 else None
        N = r.last - r.first
        grid = (N, self.pieces if self.cut else N, self.length or 0)
        piece_ends = torch.empty_like(states_saved[1]) if self.cut else None

        def recompute() -> None:
            begin, pieces = states.begin, grid
            if self.cut:
                begin = states_saved[1]
            elif self.stretch:
                assert begin is not None  # zeros, if the call has none
                begin = torch.cat((begin, states_saved[0][r.stretch : r.end - 1, r.first]))
                pieces = (N, r.end - r.stretch, self.stretch)
            launch_states(
                k, v, G_beta, norms, A, *decayed, begin, cu_seqlens, S, U, row_scales, *pieces
            )

        def reverse() -> None:
            inputs = (q, k, v, do, G_beta, norms, A, *decayed)
            outputs = (dS, dv, rowsum_RV)
            if not self.cut:
                (launch_scan,) = launch_reverse
                ends = states.d_begin, None
                launch_scan(*inputs, states.d_end, cu_seqlens, *outputs, *ends, scale, *grid)
                return
            transfer, begins = states_saved
            dN = torch.empty_like(begins)
            launch_search, launch_first, launch_combine, *launch_second = launch_reverse
            matter = dN.new_empty(dN.shape[:2], dtype=torch.int32)
            launch_search(
                k, g, beta, A_log, dt_bias, cu_seqlens, *(decayed[1:] if self.channels else ()),
                matter, N, self.length,
            )  # fmt: skip
            launch_first(*inputs, None, cu_seqlens, None, None, None, dN, matter, scale, *grid)
            d_end = states.d_end
            if exchange and self.length:  # beside `recompute_states`
                d_end = exchange(PieceMaps(transfer, dN, self.length))()
            launch_combine(
                transfer, dN, None, piece_ends, d_end, states.d_begin, cu_seqlens,
                *slot_tables(NO_TABLES), N, q.shape[1], self.length,
            )  # fmt: skip
            for launch_scan in launch_second:
                launch_scan(*inputs, piece_ends, cu_seqlens, *outputs, None, None, scale, *grid)

        # Stretches fill what `reverse_scan` leaves: it comes first then, with priority.
        aside, beside = (reverse, recompute) if self.stretch else (recompute, reverse)
        if self.joined and not self.cut:  # nothing runs beside it
            recompute()
        else:
            with side_stream(q.device):
                aside()
            beside()
            join_side_stream(q.device)
        if self.joined:
            ends = (piece_ends, None) if self.cut else (states.d_end, states.d_begin)
            launch_gradients(
                q, k, v, g, A_log, dt_bias, do, G_beta, norms, A, U, S, ends[0],
                dq, dk, dv, dg, dbeta, dA_log, ddt_bias, ends[1], scale, *grid,
            )  # fmt: skip
            return
        factors = decayed[1:] if self.channels else [G_beta, norms]
        work = U.shape[0] * q.shape[2]  # a thread block of `channel_gradients` must have some
        launch_gradients(
            q, k, g, A_log, dt_bias, do, *factors, rowsum_RV, U, S, dS, row_scales, chunk_spans,
            dq, dk, dv, dg, dbeta, dA_log, ddt_bias, scale, min(self.thread_blocks, work),
        )  # fmt: skip
