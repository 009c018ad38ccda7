"""The tokens that a causal convolution needs from the ranks before: `conv_halo`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gdn.context_parallel import SCHEMA, ContextParallel, Placement
from gdn.ops import refuse_double_backward
from gdn.token_split import Part, Split


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
    at = cp.for_tokens(x)
    padded, places = torch.ops.gdn.halo(x, taps - 1, *at)
    return padded, places


torch.library.define(
    "gdn::halo", f"(Tensor x, int width, {SCHEMA}) -> (Tensor padded, Tensor places)"
)
torch.library.define("gdn::halo_backward", f"(Tensor grad, int width, {SCHEMA}) -> Tensor")


@torch.library.impl("gdn::halo", "CompositeExplicitAutograd")
def _halo(x: Tensor, width: int, *arguments: Any) -> tuple[Tensor, Tensor]:
    at = Placement.of(arguments)
    own = at.split
    tails = x.new_zeros((len(own.parts), width, x.shape[2]))
    for slot, (start, end) in enumerate(own.ranges):
        count = min(width, end - start)
        tails[slot, width - count :] = x[0, end - count : end]
    padded = x.new_zeros((1, x.shape[1] + width * len(own.segments), x.shape[2]))
    places = _places(at, width, x.device)
    padded.index_copy_(1, places, x)
    gathered = at.all_gather(tails)
    for part, rows in zip(own.parts, _neighbours(own, width), strict=True):
        for row, number, place in rows:
            padded[0, _first_row(own, part, width) + row] = gathered[(*at.place(number), place)]
    return padded, places.clone()  # an operator's results are its own


@torch.library.register_fake("gdn::halo")
def _halo_fake(x: Tensor, width: int, *arguments: Any) -> tuple[Tensor, Tensor]:
    own = Placement.of(arguments).split
    rows = x.shape[1] + width * len(own.segments)
    return x.new_empty((1, rows, x.shape[2])), x.new_empty(x.shape[1], dtype=torch.int64)


@torch.library.impl("gdn::halo_backward", "CompositeExplicitAutograd")
def _halo_backward(grad: Tensor, width: int, *arguments: Any) -> Tensor:
    at = Placement.of(arguments)
    own = at.split
    halos = grad.new_zeros((len(own.parts), width, grad.shape[2]))
    for slot, part in enumerate(own.parts):
        if part.before:
            row = _first_row(own, part, width)
            halos[slot] = grad[0, row : row + width]
    found = grad.index_select(1, _places(at, width, grad.device))
    gathered = at.all_gather(halos)
    for part, (_, end) in zip(own.parts, own.ranges, strict=True):
        for number in reversed(part.after):  # the next one first; sums in a fixed order
            rank, slot = at.place(number)
            rows = _neighbours(at._replace(rank=rank).split, width)[slot]
            read = [(row, place) for row, n, place in rows if n == part.number]
            for row, place in read:
                found[0, end - width + place] += gathered[rank, slot, row]
            if not read:
                break
    return found


@torch.library.register_fake("gdn::halo_backward")
def _halo_backward_fake(grad: Tensor, width: int, *arguments: Any) -> Tensor:
    own = Placement.of(arguments).split
    return grad.new_empty((1, own.bounds[-1], grad.shape[2]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _, *ctx.options = inputs


def _differentiate(ctx: Any, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
    found = torch.ops.gdn.halo_backward(grad, *ctx.options)
    return found, *[None] * len(ctx.options)


torch.library.register_autograd("gdn::halo", _differentiate, setup_context=_keep)
torch.library.register_autograd("gdn::halo_backward", refuse_double_backward)


@functools.lru_cache(maxsize=64)
def _places(at: Placement, width: int, device: torch.device) -> Tensor:
    """The row of padded of each token, made once, since the layers of a model share it."""
    bounds = torch.tensor(at.split.bounds, device=device)
    tokens = torch.arange(at.lengths[at.rank], device=device)
    return tokens + width * torch.searchsorted(bounds, tokens, right=True)


def _first_row(own: Split, part: Part, width: int) -> int:
    """The first row of padded of a part's first segment, which is the halo's."""
    number = part.segments[0]
    return own.segments[number].start + number * width


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
