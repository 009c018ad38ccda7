"""The short convolution and the gated norm of transformers' layers: on kernels where they can run,
else as transformers has them. Packed sequences stay apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn import convolution, gated_norm

_SILU = ("silu", "swish")


def run_convolution(
    original: Callable[..., Tensor],
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' short convolution of [B, channels, T], within each packed sequence.

    Tokens that a cache puts in front of the packed ones belong to the first sequence.
    """
    if cu_seq_lens_q is None and kwargs.get("seq_idx") is not None:
        raise ValueError(
            "seq_idx must come with cu_seq_lens_q, from which gdn takes the bounds of packed "
            "sequences, got None; pass both"
        )
    bounds, T = cu_seq_lens_q, hidden_states.shape[-1]
    if bounds is not None:
        bounds = F.pad(bounds[1:] + (T - bounds[-1]), (1, 0))
    choice = convolution.choose(hidden_states.mT, weight.shape[-1])
    if bias is None and activation in _SILU and _is_faster(choice.engine):
        return convolution.short_convolution(hidden_states.mT, weight, cu_seqlens=bounds).mT
    if bounds is None:
        return original(hidden_states, weight, bias, activation=activation, **kwargs)

    def run(x: Tensor) -> Tensor:
        return original(x, weight, bias, activation=activation)

    return convolution.convolve_packed(run, hidden_states, bounds, weight.shape[-1])


def run_convolution_step(
    original: Callable[..., Tensor],
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """transformers' short convolution of a token [B, channels, 1]; conv_state moves on in place."""
    x = hidden_states.mT
    engine = convolution.choose_step(x, weight.shape[-1], conv_state).engine
    ours = bias is None and activation in _SILU and not torch.is_grad_enabled()
    if ours and _is_faster(engine):
        return convolution.convolve_step(x, weight, conv_state).mT
    return original(hidden_states, conv_state, weight, bias, activation)


def run_norm(
    original: Callable[..., Tensor],
    norm: Any,
    hidden_states: Tensor,
    gate: Tensor | None = None,
) -> Tensor:
    """transformers' gated RMS norm."""
    given = getattr(norm, "activation", "silu")  # which before 5.0 has no name
    activation = "silu" if given in _SILU else given
    known = gate is not None and activation in ("silu", "sigmoid")
    if gate is None or not known or gated_norm.choose(hidden_states).engine == gated_norm.TORCH:
        return original(norm, hidden_states, gate)
    weight, eps = norm.weight, norm.variance_epsilon
    return gated_norm.gated_rms_norm(hidden_states, gate, weight, eps, activation)


def _is_faster(engine: str) -> bool:
    """Whether gdn's convolution is faster than transformers': on kernels, and compiled, where
    Inductor fuses it."""
    return engine != convolution.TORCH or torch.compiler.is_compiling()
