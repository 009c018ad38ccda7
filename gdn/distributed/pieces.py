"""What leaves a rank at an edge, from the maps of the pieces that its plan cuts segments into."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.exchange import PieceMaps
from gdn.token_split import Split

from .summary import compose


def right_edge(maps: PieceMaps, split: Split, number: int, states: Tensor) -> Tensor:
    """(N | M) of a segment, [HV, K, V + K]; (N | 0), from its state in `states`, if its sequence
    begins with it."""
    found = maps.transfers[_places(maps, split, number)].mT.double()
    if split.segments[number].begins:
        V = states.shape[-1]
        N = torch.baddbmm(found[0, ..., :V], found[0, ..., V:], states[number].double())
        first = torch.nn.functional.pad(N, (0, found.shape[-1] - V))
        found = torch.cat([first[None], found[1:]])
    while len(found) > 1:  # neighbours in pairs: few launches for many pieces
        even = len(found) // 2 * 2
        found = torch.cat([compose(found[0:even:2], found[1:even:2]), found[even:]])
    return found[0].to(states.dtype)


def left_edge(maps: PieceMaps, split: Split, number: int, dS: Tensor) -> Tensor:
    """M^T dS + N' of a segment, [HV, K, V], from the gradient of the state after it in `dS`; N' if
    that is not known yet, and zero there."""
    assert maps.gradients is not None
    V, places = maps.gradients.shape[2], _places(maps, split, number)
    transfers, gradients = maps.transfers[places, :, V:].double(), maps.gradients[places].double()
    found = dS[number].double()
    for M_T, N_T in zip(reversed(transfers.unbind()), reversed(gradients.unbind()), strict=True):
        found = torch.baddbmm(N_T.mT, M_T, found)
    return found.to(dS.dtype)


def _places(maps: PieceMaps, split: Split, number: int) -> slice:
    """Where the pieces of a segment are in `maps`."""
    _, start, end, _, _ = split.segments[number]
    first = start // maps.length + number
    return slice(first, first - (start - end) // maps.length)
