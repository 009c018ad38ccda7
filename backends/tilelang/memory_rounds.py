"""How backward is cut into rounds, from shapes alone: what goes from its walks to the gradients is
in memory for one round at a time. A round has whole sequences, or a part of one; parts go backward
too, and forward keeps the states between them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from gdn.problem import CHUNK, Call

from ..common.chunking import piece_length, piece_slots, sm_count
from .tile.layout import ROWS

LEAST, MOST = 400 << 20, 4
"""Bytes of a round, at least; and rounds, at most. Sequences that are taken one by one, all in as
many parts, may need more rounds, of fewer bytes."""


def sequence_chunks(call: Call) -> int:
    """Chunks of each sequence of a dense batch; of all tokens, where they are packed."""
    return -(-call.q.shape[1] // CHUNK)


def split(call: Call) -> tuple[int, int]:
    """Sequences of a round, and parts of a sequence. Packed ones, of which one may have nearly all
    tokens, and pieces that are walked at the same time are taken together."""
    N, (HV, V), K = call.sequences, call.v.shape[2:], call.q.shape[3]
    if call.cu_seqlens is not None or piece_length(call, ROWS) is not None:
        return max(N, 1), 1
    size = call.q.element_size() * N * sequence_chunks(call) * HV * V * (2 * K + CHUNK)
    rounds = max(1, min(size // LEAST, MOST))
    # a walk forward and one back, each of half the multiprocessors at least
    fills = sm_count(call.q.device) // (2 * HV * V // ROWS)
    together = max(min(max(-(-N // rounds), fills), N), 1)
    return together, -(-rounds // max(N, 1)) if together == 1 else 1


def sequence_parts(call: Call) -> list[tuple[int, int]]:
    """First chunk, and chunks, of the parts of a sequence, at least one."""
    chunks = sequence_chunks(call)
    each = max(-(-chunks // split(call)[1]), 1)
    return [(first, min(each, chunks - first)) for first in range(0, max(chunks, 1), each)]


class MemoryRound(NamedTuple):
    """Sequences `first` to `last`, and of each the part with this number: chunks `start` to `stop`
    of so many; `slots` in all. Or all there is."""

    first: int
    last: int
    part: int
    start: int
    stop: int
    chunks: int
    slots: int
    all: bool

    def of_states(self, x: Any) -> Any:
        """The round's part of x [N, ...], if there is x."""
        return x if x is None or self.all else x[self.first : self.last]

    def of_tokens(self, x: Tensor) -> Tensor:
        """The round's part of x [B, T, ...]."""
        if self.all:
            return x
        T, count, start = x.shape[1], self.last - self.first, self.start * CHUNK
        at, each = self.first * T + start, min(self.stop * CHUNK, T) - start
        part: Tensor = x.flatten(0, 1)[at : at + count * each].unflatten(0, (count, each))
        return part

    def of_slots(self, x: Any) -> Any:
        """The round's part of x [slots of the call, ...], if there is x."""
        at = self.first * self.chunks + self.start
        return x if x is None or self.all else x[at : at + self.slots]

    def of_work(self, x: Tensor) -> Tensor:
        """As much as the round needs of x [slots of a round, ...]."""
        return x if self.all else x[: self.slots]


def memory_rounds(call: Call) -> list[MemoryRound]:
    """In the order in which backward takes them: the parts of a sequence from the last."""
    together, each = split(call)[0], list(enumerate(sequence_parts(call)))
    found = [
        (first, min(first + together, call.sequences), part, start, start + number)
        for first in range(0, max(call.sequences, 1), together)
        for part, (start, number) in reversed(each)
    ]
    chunks = sequence_chunks(call)
    if len(found) == 1:
        return [MemoryRound(*found[0], chunks, piece_slots(call, CHUNK), True)]
    return [MemoryRound(*r, chunks, (r[1] - r[0]) * (r[4] - r[3]), False) for r in found]
