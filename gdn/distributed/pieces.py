"""What leaves a rank at an edge, from the maps of the pieces that its plan cuts segments into."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gdn.exchange import PieceMaps
from gdn.token_split import Split

from .summary import compose


def right_edge(maps: PieceMaps, split: Split, number: int, states: Tensor) -> Tensor:
    """(N | M) of a segment, [HV, K, V + K]; (N | 0), from its state in `states`, if its sequence
    begins with it."""
    found = [maps.transfers[n].mT for n in _places(maps, split, number)]
    if split.segments[number].begins:
        K = found[0].shape[1]
        found.insert(0, torch.nn.functional.pad(states[number], (0, K)))
    return functools.reduce(compose, found)


def left_edge(maps: PieceMaps, split: Split, number: int, dS: Tensor) -> Tensor:
    """M^T dS + N' of a segment, [HV, K, V], from the gradient of the state after it in `dS`; N' if
    that is not known yet, and zero there."""
    assert maps.gradients is not None
    V = maps.gradients.shape[2]
    found = dS[number].double()
    for n in reversed(_places(maps, split, number)):
        M_T, N = maps.transfers[n, :, V:], maps.gradients[n].mT
        found = torch.baddbmm(N.double(), M_T.double(), found)
    return found.to(dS.dtype)


def _places(maps: PieceMaps, split: Split, number: int) -> range:
    """Where the pieces of a segment are in `maps`."""
    _, start, end, _, _ = split.segments[number]
    first = start // maps.length + number
    return range(first, first - (start - end) // maps.length)
