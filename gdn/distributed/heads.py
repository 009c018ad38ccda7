"""DTensor inputs: each rank runs the op on its own heads, and nothing is exchanged."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from gdn import calls, ops
from gdn.context_parallel import ContextParallel
from gdn.problem import CALL_TENSORS, Call

from . import parallel

_HEADS = {"initial_state": 1, "A_log": 0, "dt_bias": 0}
"""The dimension of value heads, where it is not 2."""


def is_sharded(x: object) -> bool:
    """Whether x is a DTensor. Imports nothing: without its module there are none."""
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def run(call: Call, cp: ContextParallel | None, request: str) -> tuple[Tensor, Tensor | None]:
    """The op on DTensors, which are sharded over heads or replicated in each dimension of a mesh: o
    [B, T, HV, V] and the final states [N, HV, K, V] as DTensors with the same shards.

    With cp the DTensors hold this rank's tokens, on a mesh without the dimension of cp. Plain
    tensors go to `parallel.run`.

    Raises:
        ValueError: a tensor is not sharded over heads where q is, heads do not divide, or a
            differentiable tensor is not a DTensor on q's mesh.
    """
    if not is_sharded(call.q):
        assert cp is not None
        return parallel.run(call, cp, request)
    from torch.distributed.tensor import DTensor, Shard

    mesh, placements = call.q.device_mesh, call.q.placements  # type: ignore[attr-defined]
    local: dict[str, Any] = {}
    for name, x in zip(Call._fields[:CALL_TENSORS], call[:CALL_TENSORS], strict=True):
        if name in ("cu_seqlens", "cu_seqlens_cpu", "chunk_indices"):
            local[name] = x.full_tensor() if is_sharded(x) else x  # type: ignore[union-attr]
            continue
        if x is not None:
            _check(name, x, mesh, placements, call)
            local[name] = x.to_local()  # type: ignore[union-attr]
    own = call._replace(**local)
    if cp is None:
        o, state = ops.run_forward(own, request, calls.needs_grad(own))
    else:
        o, state = parallel.run(own, cp, request)
    rows = [Shard(1) if p.is_shard() else p for p in placements]
    return (
        DTensor.from_local(o, mesh, placements, run_check=False),
        None if state is None else DTensor.from_local(state, mesh, rows, run_check=False),
    )


def _check(name: str, x: Any, mesh: Any, placements: Any, call: Call) -> None:
    """ValueError unless x is sharded over heads wherever q is, and replicated elsewhere."""
    from torch.distributed.tensor import Replicate, Shard

    if not is_sharded(x) or x.device_mesh != mesh:
        got = f"one on {x.device_mesh}" if is_sharded(x) else type(x).__name__
        raise ValueError(
            f"{name} must be a DTensor on q's mesh {mesh}, since q is one, got {got}; "
            "use torch.distributed.tensor.distribute_tensor"
        )
    dim = _HEADS.get(name, 2)
    for n, wanted in enumerate(placements):
        if wanted not in (Shard(2), Replicate()):
            raise ValueError(
                f"q must be sharded over heads, Shard(dim=2), or Replicate(), got {wanted!r} in "
                f"dimension {n} of the mesh; redistribute it, or split tokens by cp="
            )
        expected = Shard(dim) if wanted.is_shard() else Replicate()
        if x.placements[n] != expected:
            raise ValueError(
                f"{name} must be {expected!r} in dimension {n} of the mesh, since q is {wanted!r}, "
                f"got {x.placements[n]!r}; redistribute it"
            )
    ranks = 1
    for n, wanted in enumerate(placements):
        ranks *= mesh.size(n) if wanted.is_shard() else 1
    heads = {"H": call.q.shape[2], "HV": call.v.shape[2]}
    if any(count % ranks for count in heads.values()):
        raise ValueError(
            f"H and HV must be multiples of the {ranks} shards of heads, got {heads}; "
            "groups of value heads stay whole"
        )
