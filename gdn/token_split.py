"""How the tokens of sequences lie on several ranks: each rank's pieces of sequences, and the parts
that a state comes from and goes to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

Layout = Literal["contiguous", "zigzag"]


class Segment(NamedTuple):
    """The tokens of one sequence in one part: tokens start to end of the rank."""

    sequence: int
    start: int
    end: int
    begins: bool
    """Whether the segment holds the first token of its sequence."""
    ends: bool
    """Whether the segment holds the last token of its sequence."""


class Part(NamedTuple):
    """Consecutive tokens on one rank. Parts are numbered in the order of their tokens.

    segments: those of the part, as numbers of the rank's segments.
    before: the parts that its first segment's state comes from, in order: the first one holds the
        begin of the sequence, the others lie inside it. Empty if the sequence begins in this part.
    after: the parts that the gradient of its last segment's state comes from, last part first.
        Empty if the sequence ends in this part.
    tokens: how many of the sequence's tokens each part in `before` holds.
    """

    number: int
    segments: range
    before: tuple[int, ...]
    after: tuple[int, ...]
    tokens: tuple[int, ...]


class Split(NamedTuple):
    """What one rank computes and exchanges.

    parts: its parts, in the order in which their tokens lie on the rank.
    segments: the segments of all its parts.
    empty: sequences without tokens whose states belong to this rank.
    sequences: N, the number of sequences over all ranks.
    """

    parts: tuple[Part, ...]
    segments: tuple[Segment, ...]
    empty: tuple[int, ...]
    sequences: int

    @property
    def bounds(self) -> list[int]:
        """The cumulative lengths of the rank's segments."""
        return [0, *(segment.end for segment in self.segments)]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First token and end of each part, among the rank's tokens."""
        return [(self.bounds[p.segments.start], self.bounds[p.segments.stop]) for p in self.parts]

    @property
    def first(self) -> dict[int, int]:
        """Segment to sequence, where the sequence begins on this rank."""
        return {n: s.sequence for n, s in enumerate(self.segments) if s.begins}

    @property
    def last(self) -> dict[int, int]:
        """Segment to sequence, where the sequence ends on this rank."""
        return {n: s.sequence for n, s in enumerate(self.segments) if s.ends}


def part_of(number: int, ranks: int, layout: Layout) -> tuple[int, int]:
    """The rank that holds a part, and the part's place among those of the rank."""
    if layout == "contiguous":
        return number, 0
    return (number, 0) if number < ranks else (2 * ranks - 1 - number, 1)


def split(rank: int, lengths: Sequence[int], bounds: Sequence[int], layout: Layout) -> Split:
    """The share of one rank. lengths: tokens of each rank; bounds: cumulative lengths of all
    sequences, which end at the sum of lengths."""
    ranks = len(lengths)
    places = [part_of(n, ranks, layout) for n in range(ranks * (1 + (layout == "zigzag")))]
    tokens = list(lengths)
    if layout == "zigzag":
        tokens = [(lengths[r] + 1 - slot) // 2 for r, slot in places]
    edges = list(itertools.accumulate(tokens, initial=0))
    ranges = list(itertools.pairwise(edges))
    sequences = list(itertools.pairwise(bounds))
    segments: list[Segment] = []
    parts = []
    for number in [n for n, (owner, _) in enumerate(places) if owner == rank]:
        start, end = ranges[number]
        offset = (segments[-1].end if segments else 0) - start
        count = len(segments)
        segments += [
            Segment(n, max(a, start) + offset, min(b, end) + offset, a >= start, b <= end)
            for n, (a, b) in enumerate(sequences)
            if max(a, start) < min(b, end)
        ]
        before: tuple[int, ...] = ()
        after: tuple[int, ...] = ()
        counts: tuple[int, ...] = ()
        if len(segments) > count:
            begin = bounds[segments[count].sequence]
            finish = bounds[segments[-1].sequence + 1]
            filled = [n for n, (a, b) in enumerate(ranges) if a < b]
            before = tuple(n for n in filled if n < number and ranges[n][1] > begin)
            after = tuple(n for n in reversed(filled) if n > number and ranges[n][0] < finish)
            counts = tuple(ranges[n][1] - max(ranges[n][0], begin) for n in before)
        parts.append(Part(number, range(count, len(segments)), before, after, counts))
    last = len(places) - 1
    empty = tuple(
        n
        for n, (a, b) in enumerate(sequences)
        if a == b and places[next((p for p, (_, e) in enumerate(ranges) if a < e), last)][0] == rank
    )
    return Split(tuple(parts), tuple(segments), empty, len(sequences))
