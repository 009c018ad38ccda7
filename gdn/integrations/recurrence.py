"""A few tokens in the way of other libraries' recurrent functions: a state goes in, another comes
out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.serving import gated_delta_net_decode


def state_shape(tokens: dict[str, Any], options: dict[str, Any]) -> tuple[int, ...]:
    """The shape of the states of a call: [N, HV, K, V], or [N, HV, V, K] with state_v_first."""
    bounds = options.get("cu_seqlens")
    N = tokens["q"].shape[0] if bounds is None else len(bounds) - 1
    K, HV, V = tokens["k"].shape[3], tokens["v"].shape[2], tokens["v"].shape[3]
    return (N, HV, V, K) if options.get("state_v_first") else (N, HV, K, V)


def run_step(
    backend: str | None,
    tokens: dict[str, Any],
    options: dict[str, Any],
    initial_state: Tensor | None,
    output_final_state: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`gdn.gated_delta_net_decode` on a copy of the state, so that the caller's stays as it is.

    Args:
        backend: as in `gdn.gated_delta_net`.
        tokens: q, k, v, g and beta, by name.
        options: other keywords of `gdn.gated_delta_net_decode`.
        initial_state: [N, HV, K, V], or [N, HV, V, K] with state_v_first; None is zero.
        output_final_state: also return the state after the tokens.
        in_place: write to initial_state and return it, where its dtype and layout allow that.

    Returns:
        o, and the new state in float32 (float64 with float64 inputs) or None.
    """
    q = tokens["q"]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        state = q.new_zeros(state_shape(tokens, options), dtype=exact)
    elif in_place and initial_state.dtype == exact and initial_state.is_contiguous():
        state = initial_state
    else:
        state = initial_state.to(exact, copy=True, memory_format=torch.contiguous_format)
    o = gated_delta_net_decode(**tokens, state=state, backend=backend, **options)
    return o, state if output_final_state else None
