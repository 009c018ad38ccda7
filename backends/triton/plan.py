"""Prefill: the order of the stages, forward and backward, and the buffers between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.exchange import Exchange, ExchangingPlan, PieceMaps
from gdn.problem import CHUNK, Call

from ..common.allocation import allocator
from ..common.chunking import piece_slots
from .buffer_shapes import decayed_shapes, padded_keys, saved_shapes
from .channel_decay import is_weak
from .combine_pieces import combine_pieces_kernel
from .first_stages import FirstStage, bind_first_stage
from .forgetting import find_chunks_kernel
from .input_gradients import (
    Tensors,
    compute_channel_gradients,
    compute_gradients,
    prepare_channel_rows,
)
from .launch import Stage, choose_configuration, shared_memory_limit
from .piece_length import piece_length
from .reverse_scan import reverse_scan_kernel
from .scan import scan_kernel
from .strides import Strides, contiguous_strides, read_in_place

NO_POOL: Tensors = (None,) * 6
"""In place of the pool, its indices, fresh, and offsets, indices and buffer of checkpoints."""


class PrefillPlan(ExchangingPlan):
    """The launches for all calls of one kind: same shapes, dtypes, device and options.

    Calls whose tokens have other strides have plans of their own, in `strided`. `pool_flags` and
    `pool_sizes` are what kernels take of a pool of states; here there is none. `stage_type` is what
    a bound kernel is (`ahead.py`).
    """

    stage_type = Stage

    def __init__(self, call: Call, strides: Strides | None = None) -> None:
        T, HV = call.q.shape[1], call.v.shape[2]
        self.slots, self.piece_length = piece_slots(call, CHUNK), piece_length(call)
        self.constants: dict[str, Any] = {
            "H": call.q.shape[2], "HV": HV, "K": call.q.shape[3], "V": call.v.shape[3],
            "C": CHUNK, "BK": padded_keys(call), "VARLEN": call.cu_seqlens is not None,
            "L2_NORM": call.use_qk_l2norm_in_kernel,
            "FUSED_GATE": call.use_gate_in_kernel, "LOWER_BOUND": call.gate_lower_bound,
            "FUSED_SIGMOID": call.use_beta_sigmoid_in_kernel,
            "BETA_SCALE": 2.0 if call.allow_neg_eigval else 1.0,
            "CHANNELS": call.per_channel, "WEAK": is_weak(call),
            # channels of a program of `channel_gradients_kernel`, and of a step of
            # `chunk_matrices_kernel`
            "BD": 32,
        }  # fmt: skip
        self.constants |= contiguous_strides(call) if strides is None else strides
        self.strided: dict[tuple[object, ...], PrefillPlan] = {}
        self.pool_flags = {"POOL": False, "POOL_V_FIRST": False, "CHECKPOINTS": 0}
        self.clears_tail = call.cu_seqlens is not None
        self.pool_sizes = (0, 0, 0, 0, 0)
        self.device, self.itemsize = call.q.device, call.q.element_size()
        self.new_saved = [allocator(*kind, self.device) for kind in saved_shapes(call)]
        self.new_o = allocator(call.v.shape, call.v.dtype, self.device)
        self.new_final = allocator(call.state_shape, torch.float32, self.device)
        self.new_decayed = [allocator(*kind, self.device) for kind in decayed_shapes(call)]
        self.stages: dict[tuple[object, ...], Stage] = {}
        self.forward_stages: dict[bool, tuple[FirstStage, list[Stage]]] = {}
        # the sizes that kernels take, and what they mean where sequences are not packed
        chunks_per_sequence = -(-T // CHUNK)
        self.scans = call.sequences * HV
        self.piece_sizes = (1, chunks_per_sequence)  # pieces per sequence, chunks of a piece
        if self.piece_length:
            self.scans = piece_slots(call, self.piece_length) * HV
            self.piece_sizes = (-(-T // self.piece_length), self.piece_length // CHUNK)
        self.batch_invariant = call.batch_invariant
        self.chunk_sizes = (call.sequences, T, chunks_per_sequence)
        self.scan_sizes = (*self.chunk_sizes, *self.piece_sizes)

    def bind(self, kernel: Any, programs: int, sizes: tuple[int, ...], **flags: int) -> Stage:
        """A kernel bound to its sizes, to its flags, and to the plan's constants that it takes."""
        key = (kernel.fn, *flags.values())
        if key not in self.stages:
            constants = {n: x for n, x in self.constants.items() if n in kernel.arg_names} | flags
            name, limit = kernel.fn.__name__, shared_memory_limit(self.device)
            BK, channels = self.constants["BK"], self.constants["CHANNELS"]
            scans = 1 if self.batch_invariant else self.scans  # alike for all batches
            configuration = choose_configuration(name, BK, self.itemsize, scans, limit, channels)
            stage = self.stage_type(kernel, programs, configuration, sizes, **constants)
            self.stages[key] = stage
            stage.can_autotune &= not self.batch_invariant
        return self.stages[key]

    def prepare(
        self, stage: FirstStage, call: Call, gates: Tensors, factors: Tensor, matrices: Tensor
    ) -> Tensors:
        """Run forward's first stage. Return `decayed_rows` and `channel_decays`; None twice with a
        decay per head."""
        decayed = [new() for new in self.new_decayed]
        stage((call.q, call.k, *gates, factors, matrices, *decayed, call.cu_seqlens), call.scale)
        return tuple(decayed) or (None, None)

    def bind_scan(self, call: Call, o: bool, final: bool, states: bool, transfer: bool) -> Stage:
        """The scan; the flags say which of o, the final state and the states before chunks it
        writes, and whether it is the transfer scan of pieces."""
        cut = self.piece_length is not None
        initial = not transfer if cut else call.initial_state is not None
        pool_flags = dict.fromkeys(self.pool_flags, False) if transfer else self.pool_flags
        return self.bind(
            scan_kernel, self.scans, (*self.scan_sizes, *self.pool_sizes),
            V_FIRST=cut or call.state_v_first, HAS_INITIAL=initial, STORE_FINAL=final, OUTPUT=o,
            STORE_STATES=states, TRANSFER=transfer, CUT=cut, CLEAR_TAIL=self.clears_tail,
            **pool_flags,
        )  # fmt: skip

    def bind_reverse_scan(self, call: Call, final: bool, initial: bool, states: bool) -> Stage:
        """The reverse scan; the flags say whether the final state's gradient is given, and which
        gradients it writes: the initial state's, those of the states after chunks."""
        cut = self.piece_length is not None
        return self.bind(
            reverse_scan_kernel, self.scans, self.scan_sizes, V_FIRST=cut or call.state_v_first,
            HAS_GRAD_FINAL=final, STORE_GRAD_INITIAL=initial, STORE_STATES=states, CUT=cut,
        )  # fmt: skip

    def find_chunks(self, call: Call, factors: Tensor, reverse: bool) -> Tensor | None:
        """What `forgetting.py` finds for the first scan of a rank's part; None elsewhere, and with
        a decay per channel."""
        if not call.context_parallel or call.per_channel:
            return None
        found = factors.new_empty((self.scans,), dtype=torch.int32)
        find = self.bind(find_chunks_kernel, self.scans, self.scan_sizes, REVERSE=reverse)
        find((call.k, factors, found, call.cu_seqlens))
        return found

    def bind_combine_pieces(
        self, call: Call, state_in: bool, state_out: bool, reverse: bool
    ) -> Stage:
        """The kernel between the two scans of pieces."""
        return self.bind(
            combine_pieces_kernel, call.sequences * self.constants["HV"],
            (call.q.shape[1], *self.piece_sizes, *self.pool_sizes[:-1]),
            V_FIRST=call.state_v_first, HAS_STATE_IN=state_in, STORE_STATE_OUT=state_out,
            REVERSE=reverse, POOL=self.pool_flags["POOL"],
        )  # fmt: skip

    def bind_forward(self, call: Call, save: bool) -> tuple[FirstStage, list[Stage]]:
        """Forward's stages, in their order: the first one, and the scans."""
        prepare = bind_first_stage(self, call, save)
        initial, final = call.initial_state is not None, call.output_final_state
        if self.piece_length is None:
            scan = self.bind_scan(call, o=True, final=final, states=False, transfer=False)
            return prepare, [scan]
        return prepare, [
            self.bind_scan(call, o=False, final=True, states=False, transfer=True),
            self.bind_combine_pieces(call, initial, final, reverse=False),
            self.bind_scan(call, o=True, final=False, states=False, transfer=False),
        ]

    def forward(self, call: Call, save: bool) -> Forward:
        """See `gdn.backend.Plan.forward`."""
        plan, call = self.select(call)
        return plan.run_forward(call, save)

    def forward_part(self, call: Call, save: bool, exchange: Exchange) -> Forward:
        """See `gdn.exchange.ExchangingPlan.forward_part`."""
        plan, call = self.select(call)
        return plan.run_forward(call, save, exchange)

    def select(self, call: Call) -> tuple[PrefillPlan, Call]:
        """The plan for the strides of a call's tokens, and the call as kernels can read it."""
        call, strides = read_in_place(call)
        if strides is None:
            return self, call
        key = tuple(strides.values())
        if key not in self.strided:
            self.strided[key] = type(self)(call, strides)
        return self.strided[key], call

    def run_forward(self, call: Call, save: bool, exchange: Exchange | None = None) -> Forward:
        """`forward` of a call that kernels can read, with the plan's strides."""
        initial, cu_seqlens = call.initial_state, call.cu_seqlens
        saved = [new() for new in self.new_saved]
        factors, matrices, *piece_buffers = saved
        final = self.new_final() if call.output_final_state else None
        o = self.new_o()
        if save not in self.forward_stages:
            self.forward_stages[save] = self.bind_forward(call, save)
        prepare, scans = self.forward_stages[save]
        gates = (call.g, call.beta, call.A_log, call.dt_bias)
        decayed = self.prepare(prepare, call, gates, factors, matrices)
        inputs = (call.q, call.k, call.v, factors, matrices, *decayed)
        if piece_buffers:
            transfers, piece_states = piece_buffers
            if save and cu_seqlens is not None:
                piece_states.zero_()  # slots may be unused, and outputs of an op must be defined
            transfer_scan, combine_pieces, final_scan = scans
            first = self.find_chunks(call, factors, reverse=False)
            transfer_scan(
                (*inputs, None, None, transfers, None, None, None, first, cu_seqlens, *NO_POOL)
            )
            if exchange is not None:
                initial = exchange(PieceMaps(transfers, None, self.piece_sizes[1] * CHUNK))()
            combine_pieces(
                (transfers, transfers, initial, piece_states, final, cu_seqlens, *NO_POOL[:3])
            )
            final_scan((*inputs, piece_states, o, *[None] * 5, cu_seqlens, *NO_POOL))
        else:
            scans[0]((*inputs, initial, o, final, *[None] * 4, cu_seqlens, *NO_POOL))
        return Forward(o, final, saved if save else [])

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        """See `gdn.backend.Plan.backward`. Forward's scan runs again for the states, which take too
        much memory to be saved."""
        plan, call = self.select(call)
        return plan.run_backward(call, saved, grad_o, grad_final_state)

    def backward_part(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, exchange: Exchange
    ) -> Gradients:
        """See `gdn.exchange.ExchangingPlan.backward_part`."""
        plan, call = self.select(call)
        return plan.run_backward(call, saved, grad_o, None, exchange)

    def run_backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None,
        exchange: Exchange | None = None,
    ) -> Gradients:  # fmt: skip
        """`backward` of a call that kernels can read, with the plan's strides."""
        grad_o = grad_o.contiguous()
        grad_final = None if grad_final_state is None else grad_final_state.contiguous()
        factors, matrices, *piece_buffers = saved
        slots, HV, K, V = self.slots, *(self.constants[n] for n in ("HV", "K", "V"))
        states, grad_states = (call.q.new_empty((slots, HV, V, K)) for _ in range(2))
        U, R = (call.q.new_empty((slots, HV, V, CHUNK)) for _ in range(2))
        row_scales = None
        if call.q.dtype == torch.float16:
            row_scales = factors.new_empty((slots, HV, V))
            if call.per_channel:  # rounded it would be dbeta's largest error
                R = torch.empty_like(R, dtype=torch.float32)
        dS = None if call.initial_state is None else torch.empty_like(call.initial_state)
        decayed, gates, cu_seqlens = NO_POOL[:2], NO_POOL[:0], call.cu_seqlens
        if call.per_channel:
            decayed, gates = prepare_channel_rows(self, call, factors, matrices)
        inputs = (call.q, call.k, call.v, factors, matrices, *decayed)
        reverse_inputs = (call.q, call.k, factors, matrices, *decayed, grad_o, row_scales)

        # initial and final states of what is scanned: sequences, or pieces
        scan_initial, scan_grad_final, scan_grad_initial = call.initial_state, grad_final, dS
        wait: Any = None
        if piece_buffers:
            transfers, scan_initial = piece_buffers
            from_zero = torch.empty_like(scan_initial)
            scan_grad_final, scan_grad_initial = torch.empty_like(scan_initial), None
            matter = self.find_chunks(call, factors, reverse=True)
            self.bind_reverse_scan(call, final=False, initial=True, states=False)(
                (*reverse_inputs, None, None, None, from_zero, matter, cu_seqlens)
            )
            if exchange is not None:
                wait = exchange(PieceMaps(transfers, from_zero, self.piece_sizes[1] * CHUNK))
        self.bind_scan(call, o=False, final=False, states=True, transfer=False)(
            (*inputs, scan_initial, None, None, states, U, row_scales, None, cu_seqlens, *NO_POOL)
        )
        if piece_buffers:
            grad_final = grad_final if wait is None else wait()
            self.bind_combine_pieces(call, grad_final is not None, dS is not None, reverse=True)(
                (transfers, from_zero, grad_final, scan_grad_final, dS, cu_seqlens, *NO_POOL[:3])
            )
        final, initial = scan_grad_final is not None, scan_grad_initial is not None
        self.bind_reverse_scan(call, final, initial, states=True)(
            (*reverse_inputs, scan_grad_final, R, grad_states, scan_grad_initial, None, cu_seqlens)
        )

        dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in call[:5])
        parameter_terms = [  # of dA_log and ddt_bias, one a chunk; zero in unused slots
            None if x is None else x.new_zeros((slots, *x.shape), dtype=torch.float32)
            for x in (call.A_log, call.dt_bias)
        ]
        gradients = (dq, dk, dv, dg, dbeta, *parameter_terms, cu_seqlens)
        given = (states, grad_states, U, R, row_scales, grad_o, *gates)
        del decayed, inputs, reverse_inputs  # their memory serves the sums of the last stages
        compute = compute_channel_gradients if call.per_channel else compute_gradients
        compute(self, call, factors, matrices, given, gradients)
        parameter_gradients = (
            None if x is None or terms is None else terms.sum(0).to(x.dtype)
            for x, terms in zip((call.A_log, call.dt_bias), parameter_terms, strict=True)
        )
        return Gradients(dq, dk, dv, dg, dbeta, dS, *parameter_gradients)
