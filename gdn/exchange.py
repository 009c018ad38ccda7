"""What a plan tells other ranks of its part of sequences, and gets from them: `ExchangingPlan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gdn.backend import Forward, Gradients, Plan
from gdn.problem import Call


class PieceMaps(NamedTuple):
    """What each piece of a call does to states, and in backward to their gradients, in float32.

    transfers [pieces, HV, V + K, K]: N^T above M^T. A piece takes the state S before it to M S + N.
    gradients [pieces, HV, V, K]: N'^T. A piece takes the gradient dS of the state after it to
        M^T dS + N', that of the state before it. None in forward.
    length: tokens of a piece. Piece i of sequence n is at cu_seqlens[n] // length + n + i.
    """

    transfers: Tensor
    gradients: Tensor | None
    length: int


Exchange = Callable[[PieceMaps], Tensor]
"""From the maps of the call's own pieces: in forward the states before its sequences [N, HV, K, V],
in backward the gradients of the states after them, in float32. Ranks wait for each other in it, but
the host does not wait for the GPU."""


class ExchangingPlan(Plan):
    """A plan that also runs one rank's part of sequences (`Call.context_parallel`). It calls
    `exchange` once in each pass, between two scans."""

    def forward_part(self, call: Call, save: bool, exchange: Exchange) -> Forward:
        """`forward`, from the states that exchange returns. call.initial_state is not read."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_part")

    def backward_part(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, exchange: Exchange
    ) -> Gradients:
        """`backward` after `forward_part`, from the gradients that exchange returns. call has the
        initial state that exchange returned in forward."""
        raise NotImplementedError(f"{type(self).__name__} has no backward_part")
