"""vLLM 0.33 on a CPU, as tests/test_vllm_engine.py needs it: its configuration, its layers with
known parameters, their pages, and batches through its metadata and hooks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm_batches import WIDTH, Layer, Row, check, fill, random, together

from gdn.testing import TOLERANCE

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
