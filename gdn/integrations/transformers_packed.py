"""Packed sequences in transformers' layers that cannot keep them apart are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from gdn.integrations.transformers_gates import is_patched


def run_forward(original: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a layer of transformers before 5.15: while the layer is patched it refuses
    packed sequences, unless causal-conv1d keeps them apart."""
    given = [x for x in ("cu_seq_lens_q", "seq_idx") if kwargs.get(x) is not None]
    delta_net = getattr(layer, "linear_attn", layer)
    if given and is_patched(getattr(delta_net, "chunk_gated_delta_rule", None)):
        apart = delta_net is layer and delta_net.causal_conv1d_fn is not None
        if not (apart and len(given) == 2):
            raise ValueError(
                f"{given[0]} must come with transformers 5.15 or newer, got "
                f"{version('transformers')}, whose short convolution runs across packed sequences; "
                "upgrade it, or pad to a batch"
            )
    return original(layer, *args, **kwargs)


def check_state(
    cu_seqlens: Tensor | None = None, initial_state: Tensor | None = None, **_: object
) -> None:
    """Refuse to go on with several packed sequences from a cache: of the convolution's inputs it
    holds those of one."""
    if cu_seqlens is not None and len(cu_seqlens) > 2 and initial_state is not None:
        raise ValueError(
            "cu_seq_lens_q must come without earlier tokens in the cache, got some of "
            f"{len(cu_seqlens) - 1} packed sequences; go on with each alone, or pad to a batch"
        )


def find_layer_class(module: ModuleType) -> type:
    """The class of the layers that get the bounds of packed sequences: the gated delta net, or,
    where its forward takes none, the layer around it."""
    named: dict[str, type] = {
        suffix: next(x for name, x in vars(module).items() if name.endswith(suffix))
        for suffix in ("GatedDeltaNet", "DecoderLayer")
    }
    delta_net = named["GatedDeltaNet"]
    parameters = inspect.signature(delta_net.forward).parameters  # type: ignore[attr-defined]
    return delta_net if "kwargs" in parameters else named["DecoderLayer"]


def find_norm_class(module: ModuleType) -> Any:
    """The class of the gated norm of a model's layers; None if the model has none of its own."""
    every = (x for name, x in vars(module).items() if name.endswith("RMSNormGated"))
    return next((x for x in every if x is not None and x.__module__ == module.__name__), None)
