"""Strides of the tokens of a call. Kernels read q, k, v, g and beta where they lie."""

from __future__ import annotations

import math

from torch import Tensor

from gdn.problem import CALL_TENSORS, Call

Strides = dict[str, tuple[int, int, int]]
_TOKENS = ("q", "k", "v", "g", "beta")


def token_strides(call: Call) -> Strides:
    """The strides of q, k, v, g and beta, as kernels take them: of the batch beyond T tokens, of
    tokens and of heads."""
    found = {}
    for name in _TOKENS:
        x = getattr(call, name)
        row, token, head = x.stride()[:3]
        beyond = row - x.shape[1] * token if x.shape[0] > 1 else 0
        found[f"{name.upper()}_STRIDES"] = (beyond, token, head)
    return found


def contiguous_strides(call: Call) -> Strides:
    """`token_strides` of contiguous tensors."""
    found = {}
    for name in _TOKENS:
        heads, *inner = getattr(call, name).shape[2:]
        head = math.prod(inner)
        found[f"{name.upper()}_STRIDES"] = (0, heads * head, head)
    return found


def read_in_place(call: Call) -> tuple[Call, Strides | None]:
    """The call with tensors that the kernels can read, and the strides of its tokens; None if all
    are contiguous. Only the elements of a head must be contiguous in q, k and v."""
    tensors: tuple[Tensor | None, ...] = call[:CALL_TENSORS]  # type: ignore[assignment]
    for x in tensors:
        if x is not None and not x.is_contiguous():
            break
    else:
        return call, None
    copies = [None if x is None else x.contiguous() for x in tensors[len(_TOKENS) :]]
    tokens = [x if x.dim() < 4 or x.stride(3) == 1 else x.contiguous() for x in call[:5]]
    call = Call(*tokens, *copies, *call[CALL_TENSORS:])  # type: ignore[arg-type]
    return call, token_strides(call)
