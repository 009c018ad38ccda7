"""DDP and FSDP2 beside context parallelism on the ranks of a mesh: what each process of
`test_context_parallel.py` runs besides its cases."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gdn

WIDTH, LENGTHS, BOUNDS = 8, (9, 12), ([0, 4, 21], [0, 15, 21])
"""Of the layer; the tokens of each rank of cp; the sequences of each rank of dp."""


def check_data_parallel() -> None:
    """A step of a layer on a mesh of 2 x 2 (dp, cp) equals that of one process on all packs. DDP
    and FSDP average over all four ranks, so that the loss is multiplied by them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    ranks = init_device_mesh("cpu", (4,))
    torch.manual_seed(0)
    layer = gdn.nn.GatedDeltaNet(
        WIDTH, num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=4, dtype=torch.float64
    )
    x, weights = torch.randn(2, len(BOUNDS), 1, sum(LENGTHS), WIDTH, dtype=torch.float64)
    whole = copy.deepcopy(layer)
    packs = zip(x, weights, BOUNDS, strict=True)
    step(whole, [(a, b, {"cu_seqlens": torch.tensor(bounds)}) for a, b, bounds in packs], 1)

    dp, part = mesh["dp"].get_local_rank(), mesh["cp"].get_local_rank()
    own = slice(sum(LENGTHS[:part]), sum(LENGTHS[: part + 1]))
    cp = gdn.ContextParallel(mesh["cp"], BOUNDS[dp], lengths=LENGTHS)
    for wrap in (with_ddp, with_fsdp):
        wrapped = wrap(copy.deepcopy(layer), ranks)
        step(wrapped, [(x[dp][:, own], weights[dp][:, own], {"cp": cp})], ranks.size())
        expected = dict(whole.named_parameters())
        for name, parameter in wrapped.named_parameters():
            want = expected.pop(name.removeprefix("module."))
            got = parameter.full_tensor() if wrap is with_fsdp else parameter
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=f"{wrap}: {name}")
        assert not expected


def with_ddp(layer: nn.Module, ranks: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(layer, process_group=ranks.get_group())


def with_fsdp(layer: nn.Module, ranks: DeviceMesh) -> Any:
    return fully_shard(layer, mesh=ranks)


def step(layer: nn.Module, packs: list[tuple[Any, ...]], factor: int) -> None:
    """A step of SGD on the sum of the packs' losses."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    loss = sum((layer(x, **where) * weight).sum() for x, weight, where in packs)
    (factor * loss).backward()
    optimizer.step()
