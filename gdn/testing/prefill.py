"""The shared prefills on a pool of states: cases, inputs and reference results."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gdn.definition import activate, recurrence
from gdn.problem import CHUNK, Call, Prefill

from .cases import Case
from .decode import add_tail, named
from .inputs import make_inputs


@dataclass(frozen=True, slots=True)
class PrefillCase(Case):
    """One kind of prefill: a `Case`, and a pool of which every third sequence has no slot.

    own: no state_indices. fresh: every second sequence starts from zero. checkpoints: to the pool
    or to a buffer, `columns` a sequence (0: offsets are [N]). pool: the dtype of the states.
    padding: elements between slots. out: o has a place. tail: tokens past the last sequence, NaN.
    """

    own: bool = False
    fresh: bool = False
    checkpoints: Literal["none", "pool", "buffer"] = "none"
    columns: int = 0
    pool: torch.dtype = torch.float32
    padding: int = 0
    null_index: int = -1
    out: bool = False
    tail: int = 0


PREFILLS = (
    PrefillCase("dense", B=4, T=70, HV=4),
    PrefillCase("own-slots", B=2, T=65, own=True, state_v_first=True),
    PrefillCase("packed", lengths=(70, 0, 1, 64, 129), HV=4, fused=True, tail=3),
    PrefillCase("packed-fresh", lengths=(0, 70, 3, 0, 0, 65), fresh=True, state_v_first=True),
    PrefillCase("padded-slots", lengths=(5, 64), K=20, V=36, padding=3, null_index=0, out=True),
    PrefillCase("bfloat16-pool", lengths=(70, 9), HV=4, pool=torch.bfloat16, fused=True, tail=70),
    PrefillCase("float16-pool", B=2, T=70, pool=torch.float16, state_v_first=True, out=True),
    PrefillCase("checkpoint", lengths=(130, 64, 65, 20), checkpoints="pool", fresh=True, HV=4),
    PrefillCase(
        "checkpoints", lengths=(200, 0, 128, 64), checkpoints="pool", columns=3, padding=8,
        pool=torch.bfloat16, state_v_first=True, tail=9, out=True,
    ),
    PrefillCase("checkpoint-buffer", B=2, T=130, checkpoints="buffer"),
    PrefillCase(
        "checkpoints-buffer", lengths=(130, 64), checkpoints="buffer", columns=2, own=True,
        fused=True, pool=torch.float16,
    ),
    PrefillCase("head-dim-128", lengths=(33, 64), K=128, V=128, checkpoints="pool", HV=4),
    PrefillCase("channels", lengths=(70, 5, 1), HV=4, per_channel=True, fused=True, tail=2),
    PrefillCase(
        "channels-checkpoints", B=2, T=65, K=32, V=32, per_channel=True, checkpoints="pool",
        columns=2, state_v_first=True,
    ),
)  # fmt: skip
"""Prefills that cover every option of `gdn.gated_delta_net_prefill`."""


def make_prefill(
    case: PrefillCase, device: torch.device | str = "cpu", seed: int = 0, poison: bool = False
) -> dict[str, Any]:
    """Keyword arguments of `gdn.gated_delta_net_prefill` for a case, drawn as in `make_inputs`.
    `poison` fills the slots that the call must not read with NaN."""
    inputs = make_inputs(case, seed=seed)
    for name in ("initial_state", "output_final_state"):
        inputs.pop(name, None)
    generator = torch.Generator().manual_seed(seed + 1)
    N, shape = case.sequences, (case.HV, case.K, case.V)
    if case.state_v_first:
        shape = (case.HV, case.V, case.K)
    columns = max(case.columns, 1)
    slots = N if case.own else 2 * N * (2 + columns)
    size = case.HV * case.K * case.V
    pool = torch.randn(slots, size + case.padding, generator=generator)
    lengths = torch.tensor(case.lengths or [case.T] * N, dtype=torch.int64)[:N]
    read = torch.arange(N)
    inputs["null_index"] = case.null_index
    order = torch.randperm(slots, generator=generator)
    free = order[order != case.null_index].int()[: 0 if case.own else slots]
    if not case.own:
        read, free = free[:N].clone(), free[N:]
        read[2::3] = torch.tensor([case.null_index, slots, -7, 10**6])[torch.arange(N)[2::3] % 4]
        inputs["state_indices"] = read
    if case.fresh:
        inputs["fresh"] = torch.arange(N) % 2 == 1
    if case.checkpoints != "none":
        offsets = torch.arange(1, columns + 1) * CHUNK + torch.zeros(N, 1, dtype=torch.int64)
        offsets[offsets > lengths[:, None]] = 0
        offsets = offsets.int() if case.columns else offsets[:, 0]
        inputs["checkpoint_offsets"] = offsets
        if case.checkpoints == "pool":
            places = torch.full((N * columns,), case.null_index, dtype=torch.int32)
            places[: len(free)] = free[: len(places)]
            inputs["checkpoint_indices"] = places.view(offsets.shape)
    if poison:
        rows = enumerate(read.tolist())
        live = [n for n, slot in rows if named(slot, case.null_index, slots) and lengths[n]]
        if case.fresh:
            live = [n for n in live if not inputs["fresh"][n]]
        hidden = torch.ones(slots, dtype=torch.bool)
        hidden[read[live].long()] = False
        pool[hidden] = float("nan")
    exact = torch.float64 if case.dtype == torch.float64 else case.pool
    if case.checkpoints == "buffer":
        buffer = (*inputs["checkpoint_offsets"].shape, *shape)
        inputs["checkpoints"] = torch.full(buffer, float("nan"), dtype=exact)
    if case.tail:
        inputs |= add_tail(inputs, case.tail)
    if case.out:
        inputs["out"] = torch.full_like(inputs["v"], float("nan"))
    tensors = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    state = pool.to(device, exact)[:, :size].view(slots, *shape)  # with its padding
    return tensors | {"state": state}


def as_prefill(inputs: dict[str, Any]) -> Prefill:
    """The Prefill of keyword arguments of `gdn.gated_delta_net_prefill`."""
    own = {name: x for name, x in inputs.items() if name in Prefill._fields}
    rest = {name: x for name, x in inputs.items() if name not in own}
    return Prefill(Call(**{"scale": inputs["q"].shape[-1] ** -0.5} | rest), **own)


def run_prefill_definition(
    inputs: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None]:
    """o, and the pool and the checkpoints after the call, by the definition, in `dtype`, from the
    keyword arguments of `gdn.gated_delta_net_prefill`. The arguments are not changed. Tokens past
    the last sequence are zero in o."""
    given = as_prefill(inputs)
    call, null = given.call, given.null_index
    q, k, g, beta = activate(call, dtype)
    group = call.v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(group, dim=2) for x in (call.scale * q, k))
    v, pool = call.v.to(dtype), given.state.to(dtype)
    buffer = None if given.checkpoints is None else given.checkpoints.to(dtype)
    before, o, (N, T) = pool.clone(), torch.zeros_like(v), (call.sequences, q.shape[1])
    bounds = [n * T for n in range(N + 1)] if call.cu_seqlens is None else call.cu_seqlens.tolist()
    slots = list(range(N)) if given.state_indices is None else given.state_indices.tolist()
    flat = [x.flatten(0, 1) for x in (q, k, v, g, beta)]
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        fresh = given.fresh is not None and bool(given.fresh[n])
        if not named(slots[n], null, len(pool)) or (start == end and not fresh):
            continue
        S = torch.zeros_like(before[0]) if fresh else before[slots[n]]
        S = (S.mT if call.state_v_first else S)[None]
        for at in range(start, end):
            out, S = recurrence(*(x[None, at : at + 1] for x in flat), S)  # type: ignore[call-arg]
            o.flatten(0, 1)[at] = out[0, 0]
            _store_checkpoints(given, n, at + 1 - start, S[0], pool, buffer)
        pool[slots[n]] = S[0].mT if call.state_v_first else S[0]
    return o, pool, buffer


def _store_checkpoints(
    given: Prefill, n: int, done: int, S: Tensor, pool: Tensor, buffer: Tensor | None
) -> None:
    """Store S [K, V], the state after `done` tokens of sequence n, where it is asked for."""
    if given.checkpoint_offsets is None:
        return
    S = S.mT if given.call.state_v_first else S
    N = given.call.sequences
    for c, offset in enumerate(given.checkpoint_offsets.view(N, -1)[n].tolist()):
        if offset != done:
            continue
        if buffer is not None:
            buffer.view(N, -1, *S.shape[-3:])[n, c] = S
        elif given.checkpoint_indices is not None:
            slot = int(given.checkpoint_indices.view(N, -1)[n, c])
            if named(slot, given.null_index, len(pool)):
                pool[slot] = S
