"""When one kernel computes forward (`fused.py`), and its launches.

Where whole sequences fill the GPU, there is one launch. Else sequences are cut into pieces: the
kernel's transfer scan, `combine_pieces`, and the kernel again, which starts each piece from its
real state. Chosen from shapes alone, since what forgets (`forgetting.py`) only the device knows:
where nothing does, pieces must hardly take longer than `prepare` and `scan`. Where backward
follows, it scans the same pieces (`piece_lengths.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.problem import CHUNK, Call

from ...common.allocation import allocator
from ...common.chunking import piece_slots, sm_count
from ..kernels import Job, combine_pieces, fused_forward, list_sequences
from ..memory_rounds import stretches
from ..piece_lengths import one_kernel_computes, one_kernel_length, saved_length
from ..tile.pool_kind import slot_tables

MIN_SHARE = 0.57
"""Whole sequences are scanned where their scans, one on an SM at a time, keep at least this share
of the SMs busy."""
MAX_TURN_CHUNKS = 8
"""Dense sequences of at most so many chunks are taken in turn where their scans outnumber the SMs.
It saves 20 to 27 % of the time of sequences up to 300 tokens; longer ones are not timed so."""


def fills_gpu(call: Call) -> bool:
    """Whether scans of whole sequences keep the SMs busy."""
    scans, sms = call.sequences * call.v.shape[2], sm_count(call.q.device)
    return scans > 0 and scans >= MIN_SHARE * sms * -(-scans // sms)


def draws_sequences(call: Call) -> bool:
    """Whether a thread block takes one whole sequence after another (`fused_tasks.py`), instead of
    one thread block for each: in packed calls, whose lengths differ, and where many are short."""
    (B, T), HV = call.q.shape[:2], call.v.shape[2]
    many = sm_count(call.q.device) < B * HV and -(-T // CHUNK) <= MAX_TURN_CHUNKS
    return call.cu_seqlens is not None or many


def leaves_single_tokens(call: Call) -> bool:
    """Whether sequences of one token are left to decode, which takes half of the time for them: if
    the kernel draws sequences, and they are so many that some are short. Which ones, only the
    device knows."""
    tokens = call.q.shape[1]
    packed = call.cu_seqlens is not None and tokens < CHUNK * call.sequences
    whole = one_kernel_computes(call) and one_kernel_length(call) is None
    return packed and whole and fills_gpu(call)


class FusedPass:
    """What all forward calls of one kind have in common. length: tokens of a piece, None if
    sequences are not cut; draws: whether thread blocks take sequence after sequence."""

    def __init__(self, call: Call, options: dict[str, Any], length: int | None, save: bool) -> None:
        """options: those of `fused_forward`, without cut, transfer and save."""
        self.length = length
        self.jobs: list[Job] = []
        self.sequences = self.pieces = call.sequences
        if length is not None:
            self.pieces = piece_slots(call, length)
            (HV, V), K, device = call.v.shape[2:], call.q.shape[3], call.q.device
            f32 = torch.float32
            self.new_transfer = allocator((self.pieces, HV, V + K, K), f32, device)
            self.new_begins = allocator((self.pieces, HV, V, K), f32, device)
            self.new_forgets = allocator((self.pieces, HV), torch.int32, device)
            first = {"final": True, "cut": True, "transfer": True, "save": save}
            combine = {
                name: options[name]
                for name in ("offsets", "K", "V", "varlen", "initial", "v_first", "pool")
            } | {"final": False, "reverse": False, "forgetting": True}
            self.jobs = [
                (fused_forward, options | first),
                (combine_pieces, combine),
            ]
        self.draws = length is None and draws_sequences(call)
        self.blocks = min(call.sequences * call.v.shape[2], sm_count(call.q.device))
        pool = options["pool"]
        self.listed = pool is not None and pool.apart
        self.counts = self.draws and not self.listed  # from a counter that must be zero before
        self.new_counter: Any = lambda: None
        if self.draws and call.cu_seqlens is not None:
            entries = 2 + self.sequences if self.listed else 1
            self.new_counter = allocator((entries,), torch.int32, call.q.device)
        if self.listed:
            self.jobs.append((list_sequences, {"offsets": options["offsets"]}))
        last = {"cut": length is not None, "transfer": False, "ring": self.draws, "save": save}
        last |= {"initial": True} if length is not None else {}
        self.jobs.append((fused_forward, options | last))

    @classmethod
    def of(cls, call: Call, options: dict[str, Any], save: bool) -> FusedPass | None:
        """None if other kernels compute the call. save: whether it saves tensors for backward."""
        if not one_kernel_computes(call) or (save and len(stretches(call)) > 1):
            return None  # the one kernel saves no states between stretches
        own = one_kernel_length(call)
        length = saved_length(call) if save else own
        if length not in (None, own):
            return None  # backward has other pieces
        fits = length is not None or fills_gpu(call)
        return cls(call, options, length, save) if fits else None

    def run(
        self, launchers: list[Any], q: Tensor, k: Tensor, v: Tensor, gates: tuple[Any, ...],
        initial: Tensor | None, cu_seqlens: Tensor | None, o: Tensor, final: Tensor | None,
        tables: tuple[Any, ...], counter: Tensor | None, scale: float, saved: list[Tensor],
    ) -> None:  # fmt: skip
        """Launch the kernels of `jobs`. gates: g, beta, A_log, dt_bias; tables: of a pool; counter:
        from `new_counter`, or None; zero if no kernel of `jobs` makes it so; saved: filled."""
        N, inputs = self.sequences, (q, k, v)
        sizes = (
            *(saved[:2] or (None, None)), *tables[:-1], counter, tables[-1], N, self.pieces,
            self.blocks, self.length or 0, scale,
        )  # fmt: skip
        if self.length is not None:
            forgets = self.new_forgets()
            if saved:
                transfer, begins = saved[2:]
                transfer.zero_()  # M of pieces that forget, which backward reads
            else:
                transfer, begins = self.new_transfer(), self.new_begins()
            scan, combine, _ = launchers
            scan(*inputs, *gates, initial, cu_seqlens, o, transfer, forgets, *sizes)
            combine(
                transfer, None, forgets, begins, initial, None, cu_seqlens,
                *slot_tables(tables), N, q.shape[1], self.length,
            )  # fmt: skip
            initial = begins
        if self.listed:
            launchers[0](counter, cu_seqlens, q.shape[1])
        launchers[-1](*inputs, *gates, initial, cu_seqlens, o, final, None, *sizes)
