"""The tokens that a causal convolution needs from the ranks before: `conv_halo`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.context_parallel import ContextParallel, all_gather
from gdn.token_split import Split, split


def conv_halo(x: Tensor, taps: int, cp: ContextParallel) -> tuple[Tensor, Tensor]:
    """This rank's tokens with the taps - 1 tokens of their sequence in front of each segment, and
    zeros in place of tokens before a sequence's begin.

    A causal convolution of the first result, read at the second one, is that of the whole
    sequences: `convolution(padded.mT).mT.index_select(1, places)`. Differentiable in x: gradients
    of tokens that other ranks read come back. One all-gather of taps - 1 tokens of each part, and
    one more in backward. All ranks call it, and run backward.

    Args:
        x: this rank's tokens [1, T_local, D], any floating dtype.
        taps: width of the convolution, at least 1.
        cp: as for `gdn.gated_delta_net`.

    Returns:
        padded [1, T_local + S (taps - 1), D] in x's dtype, for the rank's S pieces of sequences;
        places [T_local], int64, where x's tokens are in it.

    Raises:
        TypeError: cp is not a ContextParallel.
        ValueError: x is not [1, T_local, D] with the tokens that cp expects, or taps is below 1.
    """
    if not isinstance(cp, ContextParallel):
        raise TypeError(f"cp must be a gdn.ContextParallel, got {type(cp).__name__}")
    if x.dim() != 3 or x.shape[0] != 1:
        raise ValueError(f"x must be [1, T_local, D], got {tuple(x.shape)}; pack along T")
    if taps < 1:
        raise ValueError(f"taps must be at least 1, got {taps}")
    own, width = cp.for_tokens(x), taps - 1
    halos = _Halos.apply(x, width, cp, own)  # type: ignore[no-untyped-call]
    rows = torch.cat([x, halos.flatten(0, 1)[None], x.new_zeros((1, 1, x.shape[2]))], 1)
    sources = cp.keep(("halo", taps, x.device), lambda: _sources(own, width, x))
    places = cp.keep(("places", taps, x.device), lambda: _places(own, width, x))
    return rows.index_select(1, sources), places


def _sources(own: Split, width: int, x: Tensor) -> Tensor:
    """For each row of padded its row among x's tokens, the halos of the rank's parts, and a zero
    row."""
    zero = own.bounds[-1] + width * len(own.parts)
    halos = [torch.full((width,), zero, device=x.device) for _ in own.segments]
    for slot, part in enumerate(own.parts):
        if part.before:
            begin = own.bounds[-1] + slot * width
            halos[part.segments[0]] = torch.arange(begin, begin + width, device=x.device)
    found = [torch.empty(0, dtype=torch.int64, device=x.device)]
    for halo, segment in zip(halos, own.segments, strict=True):
        found += [halo, torch.arange(segment.start, segment.end, device=x.device)]
    return torch.cat(found)


def _places(own: Split, width: int, x: Tensor) -> Tensor:
    found = [torch.empty(0, dtype=torch.int64, device=x.device)]
    for number, segment in enumerate(own.segments):
        shift = (number + 1) * width
        found.append(torch.arange(segment.start + shift, segment.end + shift, device=x.device))
    return torch.cat(found)


def _neighbours(own: Split, width: int) -> list[list[tuple[int, int, int]]]:
    """For each part of a rank, where its halo's rows come from: (row, part, row of its tail).
    A tail is the last `width` tokens of a part, aligned at the end."""
    found = []
    for part in own.parts:
        rows: list[tuple[int, int, int]] = []
        for number, tokens in zip(reversed(part.before), reversed(part.tokens), strict=True):
            for back in range(min(tokens, width - len(rows))):
                rows.append((width - 1 - len(rows), number, width - 1 - back))
        found.append(rows)
    return found


class _Halos(torch.autograd.Function):
    """The halos of the rank's parts [parts, width, D], zero where a sequence begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, cp: ContextParallel, own: Split) -> Tensor:
        ctx.options = x.shape, width, cp, own
        tails = x.new_zeros((len(own.parts), width, x.shape[2]))
        if not (width and own.crossing):
            return tails
        for slot, (start, end) in enumerate(own.ranges):
            count = min(width, end - start)
            tails[slot, width - count :] = x[0, end - count : end]
        gathered = all_gather(tails, cp.group)
        halos = torch.zeros_like(tails)
        for slot, rows in enumerate(_neighbours(own, width)):
            for row, number, place in rows:
                halos[slot, row] = gathered[(*cp.place(number), place)]
        return halos

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, width, cp, own = ctx.options
        found = grad.new_zeros(shape)
        if width and own.crossing:
            gathered = all_gather(grad, cp.group)
            ends = {part.number: end for part, (_, end) in zip(own.parts, own.ranges, strict=True)}
            for rank in range(cp.ranks):  # in a fixed order, so that sums are the same every time
                other = split(rank, cp.lengths, cp.bounds, cp.layout)
                for slot, rows in enumerate(_neighbours(other, width)):
                    for row, number, place in rows:
                        if number in ends:
                            token = ends[number] - width + place
                            found[0, token] += gathered[rank, slot, row]
        return found, None, None, None
