"""gdn in vLLM 0.33 on a CPU: vLLM's own registry makes gdn's layers, its builder makes the
metadata, its byte pages hold the states, its convolution runs under Triton's interpreter, and its
custom ops call gdn's hooks. `tox -e vllm` installs what this needs."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm_batches import WIDTH, Layer, Request, Row, make_request, random
from vllm_engine import (
    GDN,
    LAYERS,
    PREFIX,
    QWEN,
    TIGHT,
    Kernel,
    bind_pages,
    load,
    make_config,
    make_layer,
    make_metadata,
    run,
)

import gdn
from gdn.integrations import vllm as plugin

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or os.environ.get("CUDA_VISIBLE_DEVICES") != "",
        reason="run by tox -e vllm, which hides GPUs",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups of this process alone, and gdn in its registry."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # without a GPU vLLM takes no platform, whose layers then take the path of CUDA
        load("platforms").current_platform.current_device = lambda: torch.device("cpu")
        load("utils.torch_utils").PIN_MEMORY = False
        convolution = load("model_executor.layers.mamba.ops.causal_conv1d")
        convolution._causal_conv1d_fwd_kernel = Kernel(convolution._causal_conv1d_fwd_kernel)
        state = load("distributed.parallel_state")
        config = make_config(QWEN, tmp_path_factory.mktemp("model"))
        with load("config").set_current_vllm_config(config):
            store = tmp_path_factory.mktemp("store") / "file"
            state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
            state.initialize_model_parallel(1)
            plugin.replace(plugin.LAYERS)  # `register` refuses a CPU
            yield
            state.destroy_model_parallel()
            state.destroy_distributed_environment()


@pytest.fixture(autouse=True)
def on_torch() -> Iterator[None]:
    with gdn.use_backend("torch"):
        yield


def requests(x: Layer) -> list[Request]:
    return [make_request(x, seed, 220) for seed in (11, 12, 13, 14)]


@pytest.mark.parametrize("kind", LAYERS)
def test_decodes_and_prefills(kind: str, tmp_path: Path) -> None:
    x = LAYERS[kind]
    config = make_config(x, tmp_path)
    layer = make_layer(kind, config, x)
    a, b, c, d = requests(x)
    rows = [Row(a, 30, 1, (5,)), Row(b, 7, 1, (3,)), Row(c, 20, 140, (9,)), Row(d, 0, 70, (2,))]
    run(kind, layer, config, rows)
    run(kind, layer, config, rows[:2])  # decodes alone
    run(kind, layer, config, rows[2:])  # prefills alone


def test_checkpoint(tmp_path: Path) -> None:
    """A fresh and a resumed prefill whose states after 128 tokens go to the prefix cache, windows
    of the convolution too, beside a decode."""
    config = make_config(QWEN, tmp_path, mode="align")
    layer = make_layer("qwen", config, QWEN)
    assert layer.get_prefill_checkpoint_alignment() == 64
    assert layer.get_kv_cache_spec(config).num_prefill_checkpoint_blocks == 1
    a, b, c, _ = requests(QWEN)
    rows = [
        Row(a, 30, 1, (5,)), Row(b, 0, 150, (9,), checkpoint=(128, 11)),
        Row(c, 64, 150, (2,), checkpoint=(128, 7)),
    ]  # fmt: skip
    run("qwen", layer, config, rows)
    windows = layer.kv_cache[0]
    for row in rows[1:]:
        assert row.checkpoint is not None
        end = row.start + row.checkpoint[0]
        expected = row.request.qkv[end - WIDTH + 1 : end]
        assert torch.equal(windows[row.checkpoint[1], : WIDTH - 1], expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_speculative_steps(kind: str, tmp_path: Path) -> None:
    x = LAYERS[kind]
    config = make_config(x, tmp_path, steps=2)
    layer = make_layer(kind, config, x)
    a, b, c, d = requests(x)
    steps = [Row(a, 30, 3, (5, 6, 7), 2), Row(b, 9, 3, (1, 8, 2), 1)]
    run(kind, layer, config, steps)
    mixed = [
        Row(a, 30, 3, (5, 6, 7), 3), Row(c, 20, 1, (9, 10, 12)), Row(b, 9, 2, (1, 8, 2), 1),
        Row(d, 0, 70, (3, 4, 13)),
    ]  # fmt: skip
    run(kind, layer, config, mixed)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_padding_of_captured_graphs(kind: str, steps: int, tmp_path: Path) -> None:
    x = LAYERS[kind]
    config = make_config(x, tmp_path, steps=steps)
    layer = make_layer(kind, config, x)
    a, b, _, _ = requests(x)
    if steps:
        rows = [Row(a, 30, 3, (5, 6, 7), 2), Row(b, 9, 3, (1, 8, 2), 1)]
    else:
        rows = [Row(a, 30, 1, (5,)), Row(b, 7, 1, (3,))]
    run(kind, layer, config, rows, padding=2)


def test_triton(tmp_path: Path) -> None:
    """gdn's Triton kernels, on slots of these strides."""
    config = make_config(QWEN, tmp_path, steps=2)
    a, b, _, d = requests(QWEN)
    with gdn.use_backend("triton"):
        layer = make_layer("qwen", config, QWEN)
        rows = [Row(a, 30, 3, (5, 6, 7), 3), Row(b, 9, 1, (9, 10, 12)), Row(d, 0, 70, (3, 4, 13))]
        run("qwen", layer, config, rows)


def test_whole_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's own forward: vLLM's projections and gated norm around the definition. Before, a
    profile run compiles what is pending."""
    choice = importlib.import_module("gdn.integrations.vllm_choice")
    monkeypatch.setattr(choice, "_answers", {})
    monkeypatch.setattr(choice, "_cold", [])
    config = make_config(QWEN, tmp_path)
    layer = make_layer("qwen", config, QWEN)
    assert len(choice._cold) == 2
    for number, parameter in enumerate(layer.parameters()):
        if parameter.dim() == 2:
            parameter.data.copy_(random(20 + number, *parameter.shape) / 8)
    hidden, run_in = random(5, 40, 32), load("forward_context").set_forward_context
    with torch.inference_mode(), load("config").set_current_vllm_config(config):
        with run_in(None, config):
            assert layer(hidden).shape == hidden.shape
        assert not choice._cold
        qkv, z = layer.in_proj_qkvz(hidden)[0].split([QWEN.channels, QWEN.HV * QWEN.V], -1)
        beta, gate = layer.in_proj_ba(hidden)[0].chunk(2, -1)
        rows = [Row(Request(QWEN, 0, 40, raw=(qkv, gate, beta)), 0, 40, (3,))]
        bind_pages(layer, config, rows)
        with run_in({PREFIX: make_metadata(layer, config, rows)}, config):
            found = layer(hidden)
        o = rows[0].request.o.float()
        expected = layer._output_projection(o, z.unflatten(-1, (QWEN.HV, QWEN.V)))
    torch.testing.assert_close(found, expected, atol=TIGHT, rtol=TIGHT)


@pytest.fixture
def prefill_alone() -> Iterator[None]:
    """As with GDN_VLLM=prefill: the layers are vLLM's own, its chunked prefill is gdn's."""
    registry = load("model_executor.custom_op").op_registry_oot
    layers = dict(registry)
    registry.clear()
    plugin.replace(plugin.PREFILL)
    yield
    registry.clear()
    registry.update(layers)


def test_chunked_prefill_in_the_layer(tmp_path: Path, prefill_alone: None) -> None:
    """vLLM gathers and scatters states around gdn's function, and decodes by itself."""
    config = make_config(QWEN, tmp_path)
    layer = make_layer("qwen", config, QWEN, by_gdn=False)
    assert type(layer.chunk_gated_delta_rule).__module__ == "gdn.integrations.vllm_layers"
    a, _, c, d = requests(QWEN)
    run("qwen", layer, config, [Row(a, 30, 1, (5,)), Row(c, 20, 140, (9,)), Row(d, 0, 70, (2,))])


def test_chunked_prefill(tmp_path: Path, prefill_alone: None) -> None:
    """Its own arguments, and a request that no backend can run: vLLM's function then runs it."""
    config = make_config(QWEN, tmp_path)
    with load("config").set_current_vllm_config(config):
        op = load(GDN[5:] + "qwen_gdn_linear_attn").ChunkGatedDeltaRule()
    assert op.gdn_prefill_backend == "triton"
    request = make_request(Layer(H=2, HV=4, K=16, V=16), 11, 90)
    x = request.layer
    q, k, v = request.qkv.split([x.H * x.K, x.H * x.K, x.HV * x.V], -1)
    g = -x.A_log.exp() * nn.functional.softplus(request.gate + x.dt_bias)
    given = (
        q.view(1, 90, x.H, x.K), k.view(1, 90, x.H, x.K), v.view(1, 90, x.HV, x.V), g[None],
        request.beta.sigmoid()[None],
    )  # fmt: skip
    parts = [y[:, 20:] for y in given]
    buffer = torch.zeros(80, x.HV, x.V)
    with torch.inference_mode():
        o, state = op(
            *parts, initial_state=request.states[20][None].float(), output_final_state=True,
            cu_seqlens=torch.tensor([0, 70], dtype=torch.int32), core_attn_out=buffer,
        )  # fmt: skip
    options = {"atol": TIGHT, "rtol": TIGHT}
    torch.testing.assert_close(o[0].double(), request.o[20:], **options)
    torch.testing.assert_close(state[0].double(), request.states[90], **options)
    assert torch.equal(buffer[:70], o[0])
    assert not buffer[70:].any()
    called: list[dict[str, Any]] = []
    op.gdn_original = lambda **given: called.append(given)
    with gdn.use_backend("tilelang"):
        op(*parts, initial_state=state, output_final_state=True)
    assert torch.equal(called[0]["q"], parts[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "all"}, "mamba_cache_mode must be none or align, got 'all'"),
        ({"asked": "flashinfer"}, "gdn_prefill_backend must be auto, got 'flashinfer'"),
        ({"backend": "tilelang"}, "tilelang: "),
        ({"variable": "VLLM_GDN_DECODE_KERNEL=cuda"}, "VLLM_GDN_DECODE_KERNEL must not be set"),
        ({"variable": "VLLM_BATCH_INVARIANT=1"}, "VLLM_BATCH_INVARIANT must be off, got on"),
    ],
)
def test_refusals(
    change: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The layer is vLLM's own, and the log says why, once."""
    choice = importlib.import_module("gdn.integrations.vllm_choice")
    monkeypatch.setattr(choice, "_answers", {})
    monkeypatch.setattr(plugin, "_said", set())
    config = make_config(QWEN, tmp_path)
    config.cache_config.mamba_cache_mode = change.get("mode", "none")
    config.additional_config = {"gdn_prefill_backend": change.get("asked", "auto")}
    if "variable" in change:
        monkeypatch.setenv(*change["variable"].split("="))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "vllm.gdn"), gdn.use_backend(change.get("backend", "torch")):
        layer = make_layer("qwen", config, QWEN)
        config.compilation_config.static_forward_context.clear()
        make_layer("qwen", config, QWEN)
    assert layer.gdn_rule is None
    said = [line for line in caplog.messages if line.startswith("gdn ")]
    assert [words in line for line in said].count(True) == 1
    assert layer.get_prefill_checkpoint_alignment() is None


def test_register_refuses_this_platform(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "_said", set())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "vllm.gdn"):
        plugin.register()
    assert "the platform must be CUDA, got" in caplog.text


def test_vllm_finds_the_entry_point() -> None:
    found = load("plugins").load_plugins_by_group("vllm.general_plugins")
    if "gdn" not in found:
        pytest.skip("gdn is not installed")
    assert found["gdn"] is plugin.register
