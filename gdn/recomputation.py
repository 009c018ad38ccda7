"""A cache under activation checkpointing, which runs forward again within backward: the second run
would start from the state that the first one left, and gradients would be wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_recomputation() -> None:
    """RuntimeError within a backward pass. Code that is being compiled cannot know, and passes."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "cache must come outside of backward passes, got a forward within one, as "
            "activation checkpointing makes it, from the state that the first forward left; "
            "leave out the cache or the checkpointing"
        )


@torch.library.custom_op("gdn::copy_state", mutates_args=())
def copy_state(state: Tensor) -> Tensor:
    """A copy of a cache's state, from which a differentiable forward starts: the cache changes
    before backward reads it. It refuses recomputation in compiled code, too."""
    refuse_recomputation()
    return state.clone()


@copy_state.register_fake
def _copy_state_fake(state: Tensor) -> Tensor:
    return torch.empty_like(state)


def _pass_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return grad


copy_state.register_autograd(_pass_gradient)
