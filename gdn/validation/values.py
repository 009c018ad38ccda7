"""Checks of the values of index tensors: at once on the CPU, on a GPU without a device sync."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gdn.problem import Call, Step

_checked: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}


def _has_values(x: Tensor) -> bool:
    """Whether x has data. Tensors on the meta device and fake tensors have none."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def check_cu_seqlens(call: Call) -> None:
    """Check that cu_seqlens starts at 0, never descends and ends at T or before it.

    On the CPU, or with cu_seqlens_cpu, every call checks and raises ValueError. On a GPU the check
    is an asynchronous device-side assertion, so the error surfaces at the next synchronisation. It
    is queued once per tensor, since layers of one model share theirs, and again after the tensor
    changes. Changes of a tensor that was made in inference mode are not noticed.
    """
    cu_seqlens = call.cu_seqlens
    if cu_seqlens is None or not _has_values(cu_seqlens):
        return
    T = call.q.shape[1]
    given = call.cu_seqlens_cpu
    host = cu_seqlens if cu_seqlens.is_cpu else given
    if host is not None:
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
        return
    key = id(cu_seqlens)
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    seen = _checked.get(key)
    if seen is not None and seen[0]() is cu_seqlens and seen[1:] == (version, T):
        return
    ok = (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= T) & (cu_seqlens.diff() >= 0).all()
    torch._assert_async(ok, f"cu_seqlens must start at 0, never descend and not exceed T = {T}")
    _checked[key] = (weakref.ref(cu_seqlens, lambda _: _checked.pop(key, None)), version, T)


def check_slots(step: Step) -> None:
    """Check that state_indices holds null_index and slots of the pool, that num_accepted_tokens
    holds columns of state_indices, and that no sequence writes to a slot that another one reads or
    writes. Sequences may start from one slot, as the branches of a prefix do.

    Only on the CPU. On a GPU the indices change with every step, and even an assertion would take
    longer than the step; there a slot outside the pool counts as null_index.
    """
    indices, accepted = step.state_indices, step.num_accepted_tokens
    if indices is None or not (indices.is_cpu and _has_values(indices)):
        return
    slots, null = step.state.shape[0], step.null_index
    table = indices.tolist() if step.speculative else [[slot] for slot in indices.tolist()]
    for slot in itertools.chain.from_iterable(table):
        if slot != null and not 0 <= slot < slots:
            raise ValueError(
                f"state_indices must lie in 0..{slots - 1}, or be null_index = {null}, "
                f"got {slot}; the pool has {slots} slots"
            )
    starts = [0] * len(table) if accepted is None else accepted.tolist()
    for count in starts:
        if not 0 <= count < indices.shape[-1]:
            raise ValueError(
                f"num_accepted_tokens must lie in 0..T = {indices.shape[-1] - 1}, got {count}; "
                "it picks a column of state_indices"
            )
    live = [n for n, row in enumerate(table) if row[starts[n]] != null]
    writers: dict[int, int] = {}
    for n in live:
        for slot in _written(step, table[n], n):
            if slot in writers:
                raise ValueError(
                    f"state_indices must name each slot that is written once, got {slot} twice; "
                    "two states would be written to one slot"
                )
            writers[slot] = n
    for n in live:
        slot = table[n][starts[n]]
        if writers.get(slot, n) != n:
            raise ValueError(
                "state_indices must not start a sequence from a slot that another one writes, got "
                f"{slot}; copy that state to a free slot first"
            )


def _written(step: Step, row: list[int], n: int) -> list[int]:
    """The slots that sequence n writes, given its row of state_indices."""
    if not step.speculative:
        return row
    bounds, tokens = step.call.cu_seqlens, step.call.q.shape[1]
    if bounds is not None:
        tokens = int(bounds[n + 1] - bounds[n])
    return [slot for slot in row[1 : 1 + tokens] if slot != step.null_index]
