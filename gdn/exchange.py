"""What a plan tells other ranks of its part of sequences, and gets from them: `ExchangingPlan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gdn.backend import Backend, Forward, Gradients, Plan
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


Exchange = Callable[[PieceMaps], Callable[[], Tensor]]
"""Starts an exchange from the maps of the call's own pieces. The function that it returns ends it:
in forward with the states before the call's sequences [N, HV, K, V], in backward with the gradients
of the states after them, in float32. What is launched in between runs beside it; the host waits
for nothing."""


class ExchangingPlan(Plan):
    """A plan that also runs one rank's part of sequences (`Call.context_parallel`). In each pass it
    calls `exchange` once, between two scans, and what that returns."""

    def forward_part(self, call: Call, save: bool, exchange: Exchange) -> Forward:
        """`forward`, from the states of the exchange. call.initial_state is not read."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_part")

    def backward_part(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, exchange: Exchange
    ) -> Gradients:
        """`backward` after `forward_part`, from the gradients of the exchange. call has the initial
        states of forward's exchange."""
        raise NotImplementedError(f"{type(self).__name__} has no backward_part")


def call_of_a_rank(call: Call, backend: Backend) -> Call:
    """The call that a rank makes of its tokens, where sequences go on before and after them."""
    local = call._replace(output_final_state=True, state_v_first=False)
    states = call.q.new_empty(local.state_shape, dtype=torch.float32)
    local = local._replace(initial_state=states)
    return local._replace(context_parallel=backend.exchanges(local))
