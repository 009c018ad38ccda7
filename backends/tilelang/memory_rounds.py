"""Memory rounds: the shares of a backward call that are in memory at the same time.

Backward keeps S, dS and U of every chunk between its scans and `gradients`. A memory round covers
whole sequences, or one part of a sequence, and the next round uses the same buffers. The parts of a
sequence go from the last to the first; forward saves the states between them. All of this follows
from shapes alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from gdn.problem import CHUNK, Call

from ..common.chunking import piece_length, piece_slots, sm_count
from .tile.layout import ROWS

MIN_ROUND_BYTES, MAX_ROUNDS = 320 << 20, 4
"""Bytes of S, dS and U in a round, at least, and rounds, at most: for a whole batch, or for each
sequence where sequences go one by one."""


def sequence_chunks(call: Call) -> int:
    """Chunks of each sequence of a dense batch; of all tokens together if they are packed."""
    return -(-call.q.shape[1] // CHUNK)


def round_shape(call: Call) -> tuple[int, int]:
    """The number of sequences in a round, and of parts in a sequence.

    A call is one round if its sequences are packed, since one of them may have nearly all tokens,
    or if they are cut into pieces. Sequences of batch-invariant calls are whole: scans round once
    more between parts, and the batch decides how many there are.
    """
    N, (HV, V), K = call.sequences, call.v.shape[2:], call.q.shape[3]
    if call.cu_seqlens is not None or piece_length(call, ROWS) is not None:
        return max(N, 1), 1
    size = call.q.element_size() * N * sequence_chunks(call) * HV * V * (2 * K + CHUNK)
    rounds = max(1, min(size // MIN_ROUND_BYTES, MAX_ROUNDS))
    # so many sequences that `recompute_states` and `reverse_scan` fill half of the SMs each
    filling = sm_count(call.q.device) // (2 * HV * V // ROWS)
    together = max(min(max(-(-N // rounds), filling), N), 1)
    parts = 1 if together > 1 or call.batch_invariant else -(-rounds // max(N, 1))
    return together, parts


def sequence_parts(call: Call) -> list[tuple[int, int]]:
    """The parts of a sequence, at least one: first chunk and number of chunks of each."""
    chunks = sequence_chunks(call)
    each = max(-(-chunks // round_shape(call)[1]), 1)
    return [(first, min(each, chunks - first)) for first in range(0, max(chunks, 1), each)]


class MemoryRound(NamedTuple):
    """One memory round: of the sequences from `first` to `last` (exclusive) the part number `part`,
    which is the chunks from `start` to `stop` of `chunks`. `slots` counts its chunks over all
    sequences. With `all` the round is the whole call."""

    first: int
    last: int
    part: int
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
    together, parts = round_shape(call)[0], list(enumerate(sequence_parts(call)))
    found = [
        (first, min(first + together, call.sequences), part, start, start + number)
        for first in range(0, max(call.sequences, 1), together)
        for part, (start, number) in reversed(parts)
    ]
    chunks = sequence_chunks(call)
    if len(found) == 1:
        return [MemoryRound(*found[0], chunks, piece_slots(call, CHUNK), True)]
    return [MemoryRound(*r, chunks, (r[1] - r[0]) * (r[4] - r[3]), False) for r in found]
