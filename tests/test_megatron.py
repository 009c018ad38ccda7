"""Megatron-core's own Gated DeltaNet layer with gdn: through fla, and in deterministic mode. On a
CPU, where two stubs stand for fla's L2 norm and for the current GPU."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import FRAMEWORKS, documented_code
from torch import Tensor, nn

import gdn
from gdn.testing import TOLERANCE, relative_error

pytest.importorskip("fla", reason="fla-core is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    megatron = importlib.import_module("megatron.core.ssm.gated_delta_net")
    integration = importlib.import_module("gdn.integrations.megatron")
    column = importlib.import_module("megatron.core.tensor_parallel.layers")
    norms = importlib.import_module("megatron.core.transformer.torch_norm")
    specs = importlib.import_module("megatron.core.transformer.spec_utils")
    groups = importlib.import_module("megatron.core.process_groups_config")
    configs = importlib.import_module("megatron.core.transformer")
    packing = importlib.import_module("megatron.core.packed_seq_params")

SIZES: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def l2norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, the stubs, and no compiling."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    for name in ("gated_delta_net", "gated_delta_net.common"):  # where versions import it
        if module := sys.modules.get(f"megatron.core.ssm.{name}"):
            monkeypatch.setattr(module, "l2norm", l2norm)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with torch.compiler.set_stance("force_eager"):
        yield
    dist.destroy_process_group()


def make_layer(module: type, deterministic: bool) -> Any:
    """A layer as Megatron's specs build it, with random parameters."""
    config = configs.TransformerConfig(
        **SIZES,
        normalization="RMSNorm",
        activation_func=nn.functional.silu,
        use_cpu_initialization=True,
        perform_initialization=False,
        deterministic_mode=deterministic,
    )
    submodules = megatron.GatedDeltaNetSubmodules(
        in_proj=column.ColumnParallelLinear,
        out_norm=norms.WrappedTorchNorm,
        out_proj=column.RowParallelLinear,
    )
    spec = specs.ModuleSpec(module=module, submodules=submodules)
    alone = groups.ProcessGroupCollection(tp=dist.group.WORLD, cp=dist.group.WORLD)
    layer = specs.build_module(spec, config=config, layer_number=1, pg_collection=alone)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def run(layer: Any, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """The output and every gradient."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    o, _ = layer(x, attention_mask=None, **options)
    o.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return {"o": o.detach(), "x": x.grad} | gradients


def agree(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, x in expected.items():
        assert relative_error(got[name], x) <= TOLERANCE[torch.float32], name


@pytest.fixture
def x() -> Tensor:
    """Hidden states [T, B, hidden]."""
    return torch.randn(70, 2, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))


def test_megatrons_layer_runs_gdn_through_fla(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are those of its deterministic mode, forward and backward."""
    if not hasattr(megatron, "causal_conv1d_fn"):
        pytest.skip("this version's convolution is fla's, which needs a GPU")
    monkeypatch.setattr(megatron, "causal_conv1d_fn", None)
    fla = importlib.import_module("gdn.integrations.fla")
    seen: list[Any] = []
    answer = fla._run

    def count(*given: Any) -> Any:
        seen.append(given)
        return answer(*given)

    monkeypatch.setattr(fla, "_run", count)
    with fla.unregister(), fla.register():
        got = run(make_layer(megatron.GatedDeltaNet, False), x)
    assert len(seen) == 1
    agree(got, run(make_layer(megatron.GatedDeltaNet, True), x))
    assert len(seen) == 1


def test_deterministic_mode_is_gdn(x: Tensor) -> None:
    """As Megatron's own loop, and the same bits twice."""
    layer = make_layer(integration.GatedDeltaNet, True)
    got = run(layer, x)
    agree(got, run(make_layer(megatron.GatedDeltaNet, True), x))
    assert all(torch.equal(again, got[name]) for name, again in run(layer, x).items())
    with gdn.use_backend("fla"), pytest.raises(gdn.BackendUnsupportedError, match="fla"):
        layer(x, None)  # gdn is asked


def test_deterministic_mode_takes_packed_sequences(x: Tensor) -> None:
    """Each as alone, gradients of all parameters too."""
    layer, x = make_layer(integration.GatedDeltaNet, True), x[:, :1]
    bounds = torch.tensor([0, 30, 31, 70], dtype=torch.int32)
    packed = packing.PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    got = run(layer, x, packed_seq_params=packed)
    own = make_layer(megatron.GatedDeltaNet, True)
    alone = x.clone().requires_grad_()
    o = torch.cat([own(part, None)[0] for part in alone.split((30, 1, 39))])
    o.square().mean().backward()
    gradients = {name: p.grad for name, p in own.named_parameters()}
    agree(got, {"o": o.detach(), "x": alone.grad} | gradients)
    with pytest.raises((AssertionError, NotImplementedError), match=r"[Pp]acked sequence"):
        own(x, None, packed_seq_params=packed)  # why the layer is there


def test_without_deterministic_mode_forward_is_megatrons(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = (x, None)
    monkeypatch.setattr(megatron.GatedDeltaNet, "forward", lambda *_, **__: marker)
    assert make_layer(integration.GatedDeltaNet, False)(x, None) is marker
    assert make_layer(integration.GatedDeltaNet, True)(x, None) is not marker


@pytest.mark.skipif(not FRAMEWORKS.exists(), reason="not in a checkout")
def test_the_lines_of_the_documents_run() -> None:
    found: dict[str, Any] = {"ModuleSpec": specs.ModuleSpec, "submodules": None}
    exec(documented_code()["Megatron-core"], found)
    assert found["spec"].module is integration.GatedDeltaNet
