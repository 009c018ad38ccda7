"""Checks of the values of index tensors: at once on the CPU, on a GPU without a device sync."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gdn.problem import Call

_checked: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}


def has_values(x: Tensor) -> bool:
    """Whether x has data. Tensors on the meta device and fake tensors have none."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def check_bounds(call: Call) -> bool:
    """Check cu_seqlens if its values are on the host: ValueError unless it starts at 0, never
    descends and does not exceed T. Returns whether they are."""
    cu_seqlens = call.cu_seqlens
    if cu_seqlens is None or not has_values(cu_seqlens):
        return False
    T = call.q.shape[1]
    given = call.cu_seqlens_cpu
    host = cu_seqlens if cu_seqlens.is_cpu else given
    if host is None:
        return False
    bounds = host.tolist()
    name = "cu_seqlens" if host is cu_seqlens else "cu_seqlens_cpu"
    if bounds[0] != 0:
        raise ValueError(
            f"{name} must start at 0, got {bounds[0]}; prefix the cumulative lengths with 0"
        )
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(
                f"{name} must not descend, got {start} then {end} at {n} and {n + 1}; "
                "it holds cumulative lengths, cumsum the lengths first"
            )
    if bounds[-1] > T:
        raise ValueError(
            f"{name} must end at T = {T} or before it, got {bounds[-1]}; "
            "q holds fewer tokens than the lengths say"
        )
    if given is not None and given is not host and given.tolist() != bounds:
        raise ValueError(
            f"cu_seqlens_cpu must hold what cu_seqlens does, {bounds}, got {given.tolist()}; "
            "leave it out, or pass cu_seqlens.cpu()"
        )
    return True


def check_cu_seqlens(call: Call) -> None:
    """Check that cu_seqlens starts at 0, never descends and ends at T or before it.

    On the CPU, or with cu_seqlens_cpu, every call checks (`check_bounds`). On a GPU the check
    is an asynchronous device-side assertion, so the error surfaces at the next synchronisation. It
    is queued once per tensor, since layers of one model share theirs, and again after the tensor
    changes. Changes of a tensor that was made in inference mode are not noticed.
    """
    cu_seqlens = call.cu_seqlens
    if cu_seqlens is None or check_bounds(call) or not has_values(cu_seqlens):
        return
    T = call.q.shape[1]
    key = id(cu_seqlens)
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    seen = _checked.get(key)
    if seen is not None and seen[0]() is cu_seqlens and seen[1:] == (version, T):
        return
    ok = (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= T) & (cu_seqlens.diff() >= 0).all()
    torch._assert_async(ok, f"cu_seqlens must start at 0, never descend and not exceed T = {T}")
    _checked[key] = (weakref.ref(cu_seqlens, lambda _: _checked.pop(key, None)), version, T)
