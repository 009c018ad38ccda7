"""gdn under the arguments of transformers' functions for sequences and for single tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from gdn.api import gated_delta_net
from gdn.dispatch import BackendUnsupportedError
from gdn.integrations.recurrence import run_step
from gdn.integrations.transformers_gates import activate, raw_options
from gdn.integrations.transformers_packed import check_state

_OPTIONS = (
    "scale", "use_qk_l2norm_in_kernel", "cu_seqlens", "use_gate_in_kernel", "A_log", "dt_bias",
    "use_beta_sigmoid_in_kernel", "allow_neg_eigval",
)  # fmt: skip


def run_sequences(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *_: object,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' function for sequences, with its arguments; those that it does not know either
    are dropped."""
    options = {name: kwargs[name] for name in _OPTIONS if kwargs.get(name) is not None}
    return gated_delta_net(
        query, key, value, g, beta, initial_state=initial_state,
        output_final_state=output_final_state, backend=backend, **options,
    )  # fmt: skip


def run_tokens(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *_: object,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    in_place: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same for a few tokens: a decode step, or, where gradients are wanted, a short sequence.
    in_place: the step may write to initial_state, and return it."""
    tensors = (query, key, value, g, beta)
    given = (*tensors, initial_state, kwargs.get("A_log"), kwargs.get("dt_bias"))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return run_sequences(
            backend, *tensors, initial_state=initial_state,
            output_final_state=output_final_state, **kwargs,
        )  # fmt: skip
    options = {name: kwargs[name] for name in _OPTIONS if kwargs.get(name) is not None}
    tokens = dict(zip(("q", "k", "v", "g", "beta"), tensors, strict=True))
    return run_step(backend, tokens, options, initial_state, output_final_state, in_place)


def run(
    step: bool,
    backend: str | None,
    *args: Any,
    raw_gates_of: nn.Module | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`run_tokens` if step, else `run_sequences`. Kimi's layers pass the bounds of packed sequences
    on under the name that they were given. g and beta may be raw, those of a layer, which passes
    them by name.

    A step writes to the state that the layer passes: it is the cache's, and the layer replaces it
    by the result at once, which then is a copy onto itself.
    """
    if "cu_seqlens" not in kwargs:
        kwargs["cu_seqlens"] = kwargs.get("cu_seq_lens_q")
    check_state(**kwargs)
    chosen: Any = functools.partial(run_tokens, in_place=True) if step else run_sequences
    rule: Callable[..., tuple[Tensor, Tensor | None]] = chosen
    if raw_gates_of is not None:
        with suppress(BackendUnsupportedError):  # perhaps it takes activated gates
            return rule(backend, *args, **kwargs, **raw_options(raw_gates_of))
        kwargs["g"], kwargs["beta"] = activate(raw_gates_of, kwargs["g"], kwargs["beta"])
    return rule(backend, *args, **kwargs)
