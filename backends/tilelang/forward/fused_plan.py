"""When one kernel computes forward (`fused.py`), and its launches.

Where whole sequences fill the GPU, there is one launch. Else sequences are cut into pieces: the
kernel's transfer scan, `combine_pieces`, and the kernel again, which starts each piece from its
real state. Chosen from shapes alone, since what forgets (`forgetting.py`) only the device knows:
where nothing does, pieces must hardly take longer than `prepare` and `scan`. A forward that saves
takes the one launch or other kernels, since backward has pieces of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.problem import CHUNK, Call

from ...common.allocation import allocator
from ...common.chunking import piece_slots, sm_count
from ..kernels import Job, combine_pieces, fused_forward, list_sequences
from ..tile.layout import ROWS
from ..tile.pool_kind import slot_tables

MIN_SHARE = 0.57
"""Whole sequences are scanned where their scans, one on an SM at a time, keep at least this share
of the SMs busy."""
MIN_PIECES, MIN_PIECE_CHUNKS = 8, 32
"""Sequences are cut into at least so many pieces, of at least so many chunks: else `prepare` and
`scan` take much less time where nothing forgets."""
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


def choose_piece_length(call: Call) -> int | None:
    """Tokens of a piece; None if sequences are not cut.

    There are as many pieces as keep all SMs busy. The lengths of packed sequences are not known
    here, and one may have nearly all tokens: they are cut as if one did.
    """
    T, HV, sms = call.q.shape[1], call.v.shape[2], sm_count(call.q.device)
    packed = call.cu_seqlens is not None
    pieces = sms // max(HV * (1 if packed else call.sequences), 1)  # of the longest sequence
    chunks = -(-T // (CHUNK * max(pieces, 1)))
    few = 2 * call.sequences * HV <= sms
    return chunks * CHUNK if few and pieces >= MIN_PIECES and chunks >= MIN_PIECE_CHUNKS else None


def computes(call: Call) -> bool:
    """Whether one kernel can compute the call. It is chosen by the batch and does not save for
    backward, so a batch-invariant call takes others; so does a part of a rank, whose first scan
    leaves what `prepare` has made to the second one; and a decay per channel."""
    alone = not (call.batch_invariant or call.context_parallel or call.per_channel)
    return alone and call.v.shape[3] == 2 * ROWS and call.sequences > 0


def leaves_single_tokens(call: Call) -> bool:
    """Whether sequences of one token are left to decode, which takes half of the time for them: if
    the kernel draws sequences, and they are so many that some are short. Which ones, only the
    device knows."""
    tokens = call.q.shape[1]
    packed = call.cu_seqlens is not None and tokens < CHUNK * call.sequences
    return packed and computes(call) and choose_piece_length(call) is None and fills_gpu(call)


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
            combine = {
                name: options[name]
                for name in ("offsets", "K", "V", "varlen", "initial", "v_first", "pool")
            } | {"final": False, "reverse": False, "forgetting": True}
            self.jobs = [
                (fused_forward, options | {"final": True, "cut": True, "transfer": True}),
                (combine_pieces, combine),
            ]
        self.draws = length is None and draws_sequences(call)
        self.blocks = min(call.sequences * call.v.shape[2], sm_count(call.q.device))
        pool = options["pool"]
        self.listed = pool is not None and pool.apart
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
        """None if other kernels compute the call. save: whether it saves tensors for backward, and
        no states among them."""
        if not computes(call):
            return None
        length = None if save else choose_piece_length(call)
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
            *(saved or (None, None)), *tables[:-1], counter, tables[-1], N, self.pieces,
            self.blocks, self.length or 0, scale,
        )  # fmt: skip
        if self.length is not None:
            transfer, forgets = self.new_transfer(), self.new_forgets()
            begins = self.new_begins()
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
