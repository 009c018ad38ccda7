"""gdn.nn's parameters: device, dtype and initialisation, from the meta device and under FSDP, and
the cache of a layer whose parameters are sharded."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gdn.nn import GatedDeltaNet, GatedRMSNorm

HEADS = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 16, "head_v_dim": 24}


def assert_initialised(layer: GatedDeltaNet) -> None:
    """Every parameter has the values of a new layer."""
    full = {name: x.detach() for name, x in layer.named_parameters()}
    full = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in full.items()}
    assert all(x.isfinite().all() for x in full.values())
    assert ((full["A_log"] >= math.log(9e-3)) & (full["A_log"] <= math.log(16))).all()
    assert (full["dt_bias"] == 1).all()
    assert (full["norm.weight"] == 1).all()
    assert all(x.abs().max() <= 1 for name, x in full.items() if x.dim() > 1), "torch's layers"
    random = {name for name, x in full.items() if x.unique().numel() > 1}
    assert random == full.keys() - {"dt_bias", "norm.weight"}


def reset(layer: GatedDeltaNet) -> None:
    """Initialise a layer as FSDP2's recipe does, from parameters that are all NaN."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_have_device_and_dtype_and_are_reset(dtype: torch.dtype, device: str) -> None:
    layer = GatedDeltaNet(32, **HEADS, device=device, dtype=dtype)
    assert {(x.device.type, x.dtype) for x in layer.parameters()} == {(device, dtype)}
    assert_initialised(layer)
    reset(layer)
    assert_initialised(layer)
    cache = layer.make_cache(3)
    assert cache.conv.dtype == dtype
    assert cache.state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    norm = GatedRMSNorm(8, device="meta", dtype=dtype)
    assert norm.weight.is_meta
    assert norm.weight.dtype == dtype


def test_a_layer_is_built_on_the_meta_device_and_given_memory(device: str) -> None:
    with torch.device("meta"):
        layer = GatedDeltaNet(32, **HEADS)
    assert all(x.is_meta for x in layer.parameters())
    reset(layer.to_empty(device=device))
    assert_initialised(layer)
    layer = torch.nn.utils.skip_init(GatedDeltaNet, 32, **HEADS, device=device)
    reset(layer)
    assert_initialised(layer)


def test_its_text_shows_sizes_and_options() -> None:
    text = str(GatedDeltaNet(32, **HEADS, conv_size=3, norm_eps=1e-5))
    sizes = (
        "hidden_size=32, num_k_heads=2, num_v_heads=4, head_k_dim=16, head_v_dim=24, conv_size=3"
    )
    assert f"  {sizes}\n" in text
    assert "(norm): GatedRMSNorm(24, eps=1e-05)" in text
    layer = GatedDeltaNet(32, **HEADS, allow_neg_eigval=True, backend="torch")
    assert layer.extra_repr().endswith("conv_size=4, allow_neg_eigval=True, backend='torch'")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A group of one process on the CPU."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{tmp_path}/store", 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_initialises_every_parameter_from_the_meta_device(
    mesh: DeviceMesh, dtype: torch.dtype
) -> None:
    with torch.device("meta"):
        layer = GatedDeltaNet(32, **HEADS, dtype=dtype)
    fully_shard(layer, mesh=mesh)
    reset(layer.to_empty(device="cpu"))
    assert all(type(x.data).__name__ == "DTensor" for x in layer.parameters())
    assert_initialised(layer)


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_a_cache_under_fully_shard(mesh: DeviceMesh, low: torch.dtype | None) -> None:
    """It is made of ordinary tensors of full size, and each call leaves in it what the layer in the
    dtype of the computation does: FSDP, which casts inputs, hands it on as it is."""
    torch.manual_seed(0)
    plain = GatedDeltaNet(32, **HEADS, backend="torch")
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=low))
    plain = plain.to(low or torch.float32)
    ours, theirs = sharded.make_cache(2), plain.make_cache(2)
    assert type(ours.conv) is type(ours.state) is Tensor
    assert ours.conv.shape == theirs.conv.shape
    assert ours.conv.dtype == torch.float32
    x = torch.randn(2, 20, 32)
    with torch.no_grad():
        for piece in x.split([12, 1, 7], 1):
            expected = plain(piece.to(low or torch.float32), cache=theirs)
            assert torch.equal(sharded(piece, cache=ours), expected)
            assert torch.equal(ours.conv, theirs.conv.float())
            assert torch.equal(ours.state, theirs.state)
    assert ours.state.abs().sum() > 0


def test_a_cache_where_the_layer_computes() -> None:
    """Its device and dtype may differ from the parameters'."""
    cache = GatedDeltaNet(32, **HEADS).make_cache(2, device="meta", dtype=torch.bfloat16)
    assert cache.conv.is_meta
    assert cache.state.is_meta
    assert (cache.conv.dtype, cache.state.dtype) == (torch.bfloat16, torch.float32)
