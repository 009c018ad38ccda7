"""Memory rounds: the shares of a backward call that are in memory at the same time.

Between its kernels backward keeps S, dS and U of every chunk; before `reverse_gradients`, S and U.
A memory round covers whole sequences, or one part of a sequence, and the next round uses the same
buffers. The parts of a sequence go from the last to the first; forward saves the states between
them.

`recompute_states` and `reverse_scan` of a round run side by side. Where the thread blocks of both
would not find room on the SMs at the same time, parts are divided into stretches: forward saves the
states between these too, and `recompute_states` scans the stretches of a round in parallel, in more
and shorter thread blocks. All of this follows from shapes alone.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn.problem import CHUNK, Call

from ..common.chunking import piece_length, piece_slots, sm_count
from .piece_lengths import saved_length
from .tile.layout import ROWS

MIN_ROUND_BYTES, MAX_ROUNDS = 320 << 20, 4
"""Bytes of S, dS and U in a round, at least, and rounds, at most: for a whole batch, or for each
sequence where sequences go one by one. Rounds of `reverse_gradients` may be more."""
MAX_JOINED_BYTES = 1 << 30
"""Bytes of S and U in a round of whole sequences before `reverse_gradients`, at most."""
MIN_SHARE = 0.8
"""The share of the SMs that the thread blocks of `reverse_gradients` must keep busy, on average."""
MIN_STRETCH_CHUNKS = 8
"""Chunks that a stretch has at least: each is two more launches in forward."""


def sequence_chunks(call: Call) -> int:
    """Chunks of each sequence of a dense batch; of all tokens together if they are packed."""
    return -(-call.q.shape[1] // CHUNK)


def indivisible(call: Call) -> bool:
    """Whether the call cannot be divided into rounds: its sequences are packed, and one of them may
    have nearly all tokens, or they are cut into pieces."""
    return call.cu_seqlens is not None or piece_length(call, ROWS) is not None


def joined_sequences(call: Call) -> int:
    """Sequences in a round where one kernel scans backward and computes all gradients
    (`backward/reverse_gradients.py`), else 0.

    It has a thread block for a sequence or piece and a head, each on an SM. A round has the fewest
    sequences that divide the batch, fill the SMs and would take MIN_ROUND_BYTES with dS, else as
    many as fit. Where S and U are too much, two kernels, whose rounds divide sequences, take less;
    but pieces are one round in any case. The lengths of packed sequences are not known here. With
    several value heads a key head two kernels are faster: `gradients` sums what they contribute.
    """
    N, (T, H, K), (HV, V) = call.sequences, call.q.shape[1:], call.v.shape[2:]
    if (K, V, HV, call.q.dtype) != (128, 128, H, torch.bfloat16) or call.cu_seqlens is not None:
        return 0
    if call.per_channel or call.batch_invariant or call.context_parallel or N * T * H == 0:
        return 0
    if (length := saved_length(call)) is not None:
        return N if fills(call, piece_slots(call, length) * H) else 0
    rows = call.q.element_size() * sequence_chunks(call) * H * V
    most = MAX_JOINED_BYTES / (rows * (K + CHUNK))
    least = MIN_ROUND_BYTES / (rows * (2 * K + CHUNK))
    fitting = [n for n in range(1, N + 1) if N % n == 0 and n <= most and fills(call, n * H)]
    return next((n for n in fitting if n >= least), max(fitting, default=0))


def joins_gradients(call: Call) -> bool:
    """Whether one kernel scans backward and computes all gradients."""
    return joined_sequences(call) > 0


def fills(call: Call, blocks: int) -> bool:
    """Whether so many equal thread blocks keep nearly all SMs busy, one on each."""
    sms = sm_count(call.q.device)
    return blocks >= MIN_SHARE * sms * -(-blocks // sms)


def fills_badly(call: Call) -> bool:
    """Whether the scans of one sequence would take turns instead of running side by side.

    A sequence has equally many thread blocks of `recompute_states` and of `reverse_scan`, which
    needs an SM for each. If these are more than half of the SMs, some blocks of one scan wait until
    the other one ends; from three quarters on, `reverse_scan` leaves too few SMs for it to matter.
    Batch-invariant calls are not divided (`round_shape`). With a decay per channel
    `recompute_states`, too, may need an SM for a block.
    """
    if indivisible(call) or call.batch_invariant or call.per_channel or joins_gradients(call):
        return False
    blocks, sms = call.v.shape[2] * call.v.shape[3] // ROWS, sm_count(call.q.device)
    return 2 * blocks > sms and 4 * blocks <= 3 * sms


def round_shape(call: Call) -> tuple[int, int]:
    """The number of sequences in a round, and of parts in a sequence.

    Sequences of batch-invariant calls are whole: scans round once more between parts, and the batch
    decides how many there are.
    """
    N, (HV, V), K = call.sequences, call.v.shape[2:], call.q.shape[3]
    if together := joined_sequences(call):
        return together, 1
    if indivisible(call):
        return max(N, 1), 1
    size = call.q.element_size() * N * sequence_chunks(call) * HV * V * (2 * K + CHUNK)
    rounds = max(1, min(size // MIN_ROUND_BYTES, MAX_ROUNDS))
    # so many sequences that `recompute_states` and `reverse_scan` fill half of the SMs each
    filling = sm_count(call.q.device) // (2 * HV * V // ROWS)
    if rounds <= N and fills_badly(call):
        filling = 2  # in place of stretches, which need sequences one by one
    together = max(min(max(-(-N // rounds), filling), N), 1)
    parts = 1 if together > 1 or call.batch_invariant else -(-rounds // max(N, 1))
    return together, parts


def sequence_parts(call: Call) -> list[tuple[int, int]]:
    """The parts of a sequence, at least one: first chunk and number of chunks of each."""
    chunks = sequence_chunks(call)
    each = max(-(-chunks // round_shape(call)[1]), 1)
    return [(first, min(each, chunks - first)) for first in range(0, max(chunks, 1), each)]


def stretch_length(call: Call) -> int | None:
    """Tokens of a stretch, if parts are divided into stretches, else None: two stretches a part, or
    four where the call is one round. The last one of a part may be shorter."""
    together, parts = round_shape(call)
    if together > 1 or not fills_badly(call):
        return None
    part = sequence_parts(call)[0][1]
    each = max(-(-part // (4 if parts == 1 else 2)), MIN_STRETCH_CHUNKS)
    return each * CHUNK if each < part else None


def stretches(call: Call) -> list[tuple[int, int]]:
    """The stretches of a sequence, at least one a part: first chunk and number of chunks of each.
    Forward saves the states between them."""
    parts, length = sequence_parts(call), stretch_length(call)
    if length is None:
        return parts
    each = length // CHUNK
    return [
        (at, min(each, first + number - at))
        for first, number in parts
        for at in range(first, first + number, each)
    ]


class MemoryRound(NamedTuple):
    """One memory round: of the sequences from `first` to `last` (exclusive) a part, which is the
    stretches from number `stretch` to `end`, the chunks from `start` to `stop` of `chunks`. `slots`
    counts its chunks over all sequences. With `all` the round is the whole call."""

    first: int
    last: int
    stretch: int
    end: int
    start: int
    stop: int
    chunks: int
    slots: int
    all: bool

    def of_states(self, x: Any) -> Any:
        """The round's entries of x [N, ...], or None."""
        return x if x is None or self.all else x[self.first : self.last]

    def of_tokens(self, x: Tensor) -> Tensor:
        """The round's tokens of x [B, T, ...]."""
        if self.all:
            return x
        if self.stop - self.start == self.chunks:
            return x[self.first : self.last]
        return x[self.first, self.start * CHUNK : self.stop * CHUNK].unsqueeze(0)

    def of_slots(self, x: Any) -> Any:
        """The round's chunks of x [slots of the call, ...], or None."""
        at = self.first * self.chunks + self.start
        return x if x is None or self.all else x[at : at + self.slots]

    def of_work(self, x: Any) -> Any:
        """What the round needs of a buffer x [slots of the largest round, ...], or None."""
        return x if x is None or self.all else x[: self.slots]


def memory_rounds(call: Call) -> list[MemoryRound]:
    """The rounds in the order in which backward takes them; of a sequence, the last part first."""
    together, N = round_shape(call)[0], call.sequences
    parts, starts = sequence_parts(call), [first for first, _ in stretches(call)]
    alone = len(parts) == 1 and together >= N
    return [
        MemoryRound(
            first=first,
            last=(last := min(first + together, N)),
            stretch=bisect_left(starts, start),
            end=bisect_left(starts, start + number),
            start=start,
            stop=start + number,
            chunks=sequence_chunks(call),
            slots=piece_slots(call, CHUNK) if alone else (last - first) * number,
            all=alone,
        )
        for first in range(0, max(N, 1), together)
        for start, number in reversed(parts)
    ]
