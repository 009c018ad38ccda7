"""gdn in vLLM 0.33 on a CPU: vLLM's own registry makes gdn's layers, its builder makes the
metadata, its byte pages hold the states, its convolution runs under Triton's interpreter, and its
custom ops call gdn's hooks. `tox -e vllm` installs what this needs."""

from __future__ import annotations

import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm_batches import WIDTH, Layer, Request, Row, check, fill, make_request, random, together

import gdn
from gdn.integrations import vllm as plugin
from gdn.testing import TOLERANCE

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # else vLLM wants a driver of Triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")
GDN = "vllm.model_executor.layers.mamba.gdn."
PREFIX = "model.layers.0.linear_attn"
BLOCK = 64
TIGHT = TOLERANCE[torch.float32]
QWEN = Layer(H=2, HV=4, K=16, V=16, convolved=True)
LAYERS = {
    "qwen": QWEN,
    "olmo": Layer(H=4, HV=4, K=16, V=32, convolved=True, allow_neg_eigval=True),
    "kimi": Layer(H=4, HV=4, K=16, V=16, convolved=True, per_channel=True),
}


def load(name: str) -> Any:
    return importlib.import_module(f"vllm.{name}")


class Kernel:
    """A kernel of Triton whose grid changes its arguments, as vLLM's does. The interpreter asks for
    the grid when it has converted them."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            sizes = grid(given)
            self.kernel[sizes](**given)

        return launch


def model_config(x: Layer) -> dict[str, Any]:
    """Of a small Qwen3-Next whose linear attention has these sizes."""
    return {
        "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "hidden_size": 32,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "linear_num_key_heads": x.H, "linear_num_value_heads": x.HV, "linear_key_head_dim": x.K,
        "linear_value_head_dim": x.V, "linear_conv_kernel_dim": WIDTH, "vocab_size": 64,
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "intermediate_size": 32,
        "max_position_embeddings": 1024, "torch_dtype": "float32",
    }  # fmt: skip


def make_config(x: Layer, folder: Path, steps: int = 0, mode: str = "none") -> Any:
    """vLLM's configuration, with so many speculative tokens and this cache mode."""
    (folder / "config.json").write_text(json.dumps(model_config(x)))
    c = load("config")
    model = c.ModelConfig(
        model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="float32",
        max_model_len=1024,
    )  # fmt: skip
    drafts = None
    if steps:
        drafts = c.SpeculativeConfig(
            method="ngram", num_speculative_tokens=steps, prompt_lookup_max=2,
            target_model_config=model, target_parallel_config=c.ParallelConfig(),
        )  # fmt: skip
    config = c.VllmConfig(
        model_config=model,
        speculative_config=drafts,
        cache_config=c.CacheConfig(block_size=BLOCK),
        scheduler_config=c.SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=512, max_model_len=1024, is_encoder_decoder=False
        ),
        device_config=c.DeviceConfig(device="cpu"),
    )
    cache = config.cache_config  # what the engine derives from the model and the GPU
    cache.mamba_cache_mode, cache.mamba_block_size = mode, BLOCK
    if mode == "align":
        cache.hash_block_size = cache.cache_hit_alignment_tokens = BLOCK
    return config


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


def make_layer(kind: str, config: Any, x: Layer, by_gdn: bool = True) -> Any:
    """The layer that a model of vLLM gets, with the parameters of x."""
    with load("config").set_current_vllm_config(config):
        hf = config.model_config.hf_text_config
        if kind == "qwen":
            made = load(GDN[5:] + "qwen_gdn_linear_attn").QwenGatedDeltaNetAttention(
                hf, config, PREFIX
            )
        elif kind == "olmo":
            hf.linear_allow_neg_eigval = x.allow_neg_eigval
            made = load(GDN[5:] + "olmo_gdn_linear_attn").OlmoHybridGatedDeltaNetAttention(
                hf, config, PREFIX
            )
        else:
            hf.linear_attn_config = {
                "head_dim": x.K, "num_heads": x.HV, "short_conv_kernel_size": WIDTH,
            }  # fmt: skip
            made = load(GDN[5:] + "kimi_gdn_linear_attn").KimiGatedDeltaNetAttention(
                hf, config, PREFIX
            )
            made.o_norm = Second()
    with torch.no_grad():
        for parameter, value in (
            (made.A_log, x.A_log), (made.dt_bias, x.dt_bias),
            (made.conv1d.weight, x.weight[:, None]),
        ):  # fmt: skip
            parameter.copy_(value)
    assert (type(made).__module__ == "gdn.integrations.vllm_layers") == by_gdn
    return made


class Second(nn.Module):
    """In place of Kimi's gated norm, which the definition does not have."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x


def bind_pages(layer: Any, config: Any, rows: list[Row]) -> Tensor:
    """Give the layer pages as the engine does, filled; returns the states among them. The first
    block stays zero."""
    spec = layer.get_kv_cache_spec(config)
    pages = torch.zeros(24, 1, 1, spec.page_size_bytes + 64, dtype=torch.int8)
    layer.bind_kv_cache(pages)
    windows, states = layer.kv_cache
    assert states.stride(0) > states[0].numel(), "slots must be padded"
    fill(states, rows)
    windows.copy_(random(8, *windows.shape))
    for row in rows:
        if row.start:
            before = row.request.qkv[row.start - WIDTH + 1 : row.start]
            skipped = (row.accepted or 1) - 1
            slot = row.slots[0]  # the first column holds the window of all columns
            windows[slot, skipped : skipped + WIDTH - 1] = before
    return states


def make_metadata(layer: Any, config: Any, rows: list[Row], padding: int = 0) -> Any:
    """Those of vLLM's own builder. Padding is that of a captured graph: rows without tokens, and a
    token for each, or a step for each."""
    spec = layer.get_kv_cache_spec(config)
    backend = layer.get_attn_backend()
    assert backend.get_name() == "GDN_ATTN"
    speculative = [row.accepted is not None for row in rows]
    builder = backend.get_builder_cls()(spec, [PREFIX], config, torch.device("cpu"))
    if padding:
        builder.use_full_cuda_graph, builder.decode_cudagraph_max_bs = True, 16
        for name in ("spec_state_indices_tensor", "non_spec_state_indices_tensor",
                     "spec_sequence_masks", "spec_query_start_loc", "non_spec_query_start_loc",
                     "num_accepted_tokens", "spec_token_indx", "non_spec_token_indx"):  # fmt: skip
            buffer = getattr(builder, name)
            setattr(builder, name, buffer.new_zeros(64, *buffer.shape[1:]))
    lengths = [row.length for row in rows] + [0] * padding
    seen = [row.start + row.length for row in rows] + [0] * padding
    columns = 1 + layer.num_spec
    if config.cache_config.mamba_cache_mode == "align":
        columns = 1 + max(seen) // BLOCK
    table = torch.zeros(len(rows) + padding, columns, dtype=torch.int32)
    for n, row in enumerate(rows):
        if config.cache_config.mamba_cache_mode == "align":
            last = (row.start + row.length - 1) // BLOCK
            table[n, last] = row.slots[0]
            if row.checkpoint is not None:
                table[n, last - 1] = row.checkpoint[1]
        else:
            table[n, : len(row.slots)] = torch.tensor(row.slots)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = int(starts[-1]) + padding * (columns if any(speculative) else 1)
    common = load("v1.attention.backend").CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(seen, dtype=torch.int32), num_reqs=len(rows) + padding,
        num_actual_tokens=tokens, max_query_len=max(lengths), max_seq_len=max(seen),
        block_table_tensor=table, slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        seq_lens_cpu_upper_bound=torch.tensor(seen, dtype=torch.int32),
        is_prefilling=torch.tensor([row.start == 0 for row in rows] + [False] * padding),
    )  # fmt: skip
    given = {}
    if layer.num_spec:
        given = {
            "num_accepted_tokens": torch.tensor(
                [row.accepted or 1 for row in rows] + [1] * padding, dtype=torch.int32
            ),
            "num_decode_draft_tokens_cpu": torch.tensor(
                [row.length - 1 if row.accepted is not None else -1 for row in rows]
                + [-1] * padding
            ),
        }
    return builder.build(0, common, **given)


def run(kind: str, layer: Any, config: Any, rows: list[Row], padding: int = 0) -> None:
    """Run a batch by vLLM's hook, and compare."""
    states = bind_pages(layer, config, rows)
    before = states.clone()
    metadata = make_metadata(layer, config, rows, padding)
    x = rows[0].request.layer
    T = metadata.num_actual_tokens + 3
    live = len(together(rows, "o"))
    qkv, gate, beta = (
        torch.cat([y, y.new_zeros(T - live, *y.shape[1:])])
        for y in (together(rows, name) for name in ("qkv", "gate", "beta"))
    )
    out = torch.zeros(T, x.HV, x.V)
    context = load("forward_context")
    with (
        torch.inference_mode(),
        load("config").set_current_vllm_config(config),
        context.set_forward_context({PREFIX: metadata}, config),
    ):
        if kind == "kimi":
            layer._forward(qkv, gate[None], out[None], beta[None], out[None])
        elif kind == "olmo":
            layer._forward_core(mixed_qkv=qkv, b=beta, a=gate, core_attn_out=out)
        else:
            name = load("utils.torch_utils")._encode_layer_name(PREFIX)
            torch.ops.vllm.qwen_gdn_attention_core(qkv, beta, gate, out, layer_name=name)
    check(rows, out, before, states, TIGHT)
    assert not out[live:].any()


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
        ({"environment": "cuda"}, "VLLM_GDN_DECODE_KERNEL must not be set"),
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
    if "environment" in change:
        monkeypatch.setenv("VLLM_GDN_DECODE_KERNEL", change["environment"])
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
