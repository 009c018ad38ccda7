"""A Gated DeltaNet layer in SGLang, driven on a CPU: its own flags, registries, pools, metadata and
hooks, its convolution and gates under Triton's interpreter. Of what SGLang needs for other work,
`ABSENT` may be missing. Import this only where sglang is installed."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gdn.integrations import sglang as integration
from gdn.integrations.sglang_kernels import RAW
from gdn.testing.absent import stand_in
from gdn.testing.decode import run_step_definition

ABSENT = ("torchvision", "sgl_kernel", "compressed_tensors", "gguf")
"""Packages of images, of CUDA kernels and of quantized weights, which SGLang imports."""

METADATA = ("init_forward_metadata", "init_forward_metadata_out_graph", "init_cuda_graph_state")
"""What SGLang asks of each of a model's backends."""


def load() -> Any:
    """sglang.srt.plugins, after what SGLang does first in each of its processes: load its plugins.
    gdn's may not be installed as one, in a checkout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = importlib.import_module("transformers.utils")
        transformers.is_torchvision_available()  # remembered: it is not
        stand_in(*ABSENT)
        plugins = importlib.import_module("sglang.srt.plugins")
        plugins.load_plugins()
        integration.register()
        find("plugins.hook_registry").HookRegistry.apply_hooks()
        find("layers.attention.linear.gdn_backend")
    return plugins


def find(name: str) -> Any:
    """A module of SGLang's runtime."""
    return importlib.import_module(f"sglang.srt.{name}")


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads and sizes of the layer, the most draft tokens of a step, and dtypes."""

    H: int = 2
    HV: int = 4
    K: int = 16
    V: int = 8
    drafts: int = 3
    pool: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        """q, k and v of a token."""
        return 2 * self.H * self.K + self.HV * self.V


class Engine(contextlib.ExitStack):
    """One layer, its pools for `slots` states, and SGLang's backends as `flags` choose them.
    A context, since flags are SGLang's for the whole process."""

    def __init__(self, shape: Shape, slots: int = 12, **flags: Any) -> None:
        super().__init__()
        self.shape, context = shape, find("runtime_context")
        defaults = {
            "attention_backend": "triton",
            "chunked_prefill_size": -1,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": shape.drafts,
            "_mamba_cache_chunk_size": 64,
        }
        args = context.get_context().override_server_args(**defaults | flags)
        self.args = self.enter_context(args)
        linear = find("layers.attention.linear.utils")
        self.pools = self._make_pools(slots)
        self.runner = SimpleNamespace(
            server_args=self.args, device="cpu", dtype=shape.dtype, is_draft_worker=False,
            req_to_token_pool=self.pools, token_to_kv_pool=None,
            model_config=SimpleNamespace(hf_text_config=SimpleNamespace()),
        )  # fmt: skip
        self.runner.linear_attn_backends = linear.resolve_linear_attn_backends()
        backend = find("layers.attention.linear.gdn_backend").GDNAttnBackend(self.runner)
        self.linear, self.kernels = backend, backend.kernel_dispatcher
        self.backend = find("layers.attention.hybrid_linear_attn_backend").HybridLinearAttnBackend(
            self._make_attention(), backend, []
        )
        self.layer = self._make_layer()

    def _make_pools(self, slots: int) -> Any:
        s, configs = self.shape, find("configs.mamba_utils")
        shape = configs.Mamba2StateShape.create(
            tp_world_size=1, intermediate_size=s.HV * s.V, n_groups=s.H, num_heads=s.HV,
            head_dim=s.V, state_size=s.K, conv_kernel=4,
        )  # fmt: skip
        dtypes = configs.Mamba2StateDType(conv=s.dtype, temporal=s.pool)
        return find("mem_cache.memory_pool").HybridReqToTokenPool(
            size=8, mamba_size=slots, mamba_spec_state_size=8, max_context_len=512, device="cpu",
            enable_memory_saver=False, mamba_layer_ids=[0], enable_mamba_extra_buffer=True,
            cache_params=configs.Mamba2CacheParams(shape=shape, layers=[0], dtype=dtypes),
            speculative_num_draft_tokens=s.drafts, speculative_eagle_topk=1,
            enable_overlap_schedule=False,
        )  # fmt: skip

    def _make_attention(self) -> Any:
        """A backend for the model's other layers, of which there are none."""
        base = find("layers.attention.base_attn_backend").AttentionBackend
        nothing = dict.fromkeys(METADATA, lambda *args, **kwargs: None)
        attention = type("NoAttention", (base,), nothing)()
        attention.token_to_kv_pool = attention.kv_index_translator = None
        attention.req_to_token_pool = self.pools
        return attention

    def _make_layer(self) -> Any:
        s, generator = self.shape, torch.Generator().manual_seed(1)
        return find("layers.radix_linear_attention").RadixLinearAttention(
            layer_id=0, num_q_heads=s.H, num_k_heads=s.H, num_v_heads=s.HV, head_q_dim=s.K,
            head_k_dim=s.K, head_v_dim=s.V, activation="silu",
            conv_weights=torch.randn(s.width, 4, generator=generator).to(s.dtype),
            A_log=torch.randn(s.HV, generator=generator),
            dt_bias=torch.randn(s.HV, generator=generator),
        )  # fmt: skip

    @property
    def states(self) -> Tensor:
        """The layer's pool [slots, HV, V, K]."""
        found: Tensor = self.pools.mamba2_layer_cache(0).temporal
        return found

    def draw(self, tokens: int) -> Tensor:
        """What the projections of so many tokens give: [T, width + 2 HV], q, k and v, the raw gate
        and beta's logit."""
        x = torch.randn(tokens, self.shape.width + 2 * self.shape.HV)
        return x.to(self.shape.dtype)

    def assign(self, row: int, slot: int) -> None:
        """Give a request's row a slot."""
        self.pools.req_index_to_mamba_index_mapping[row] = slot

    def make_batch(
        self, mode: str, rows: Sequence[int], lengths: Sequence[int], **more: Any
    ) -> Any:
        """SGLang's batch of requests, whose rows have so many tokens before and in this step."""
        info = find("model_executor.forward_batch_info")
        N, T = len(rows), more.pop("T", 1)
        return info.ForwardBatch(
            forward_mode=info.ForwardMode[mode], batch_size=N,
            input_ids=torch.zeros(T, dtype=torch.int64),
            req_pool_indices=torch.tensor(rows, dtype=torch.int64),
            seq_lens=torch.tensor(lengths), seq_lens_cpu=torch.tensor(lengths),
            out_cache_loc=torch.arange(T), seq_lens_sum=sum(lengths), **more,
        )  # fmt: skip

    def extend(
        self, rows: Sequence[int], tokens: Sequence[Tensor], before: Sequence[int],
        track: dict[int, int] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Prefill a part of each request, which has so many tokens before it. track: the slot that
        takes a row's checkpoint, the state after its last whole chunk of 64 tokens."""
        lens, track = [len(x) for x in tokens], track or {}
        ends = [start + n for start, n in zip(before, lens, strict=True)]
        starts = torch.tensor([0, *lens]).cumsum(0)
        more: dict[str, Any] = {}
        if track:
            mask = [row in track for row in rows]
            more = {
                "mamba_track_mask": torch.tensor(mask), "mamba_prefill_track_mask_cpu": mask,
                "mamba_track_indices": torch.tensor([track.get(row, 0) for row in rows]),
                "mamba_track_seqlens": torch.tensor(ends), "mamba_track_seqlens_cpu": ends,
            }  # fmt: skip
        batch = self.make_batch(
            "EXTEND", rows, ends, T=sum(lens), extend_prefix_lens=torch.tensor(before),
            extend_prefix_lens_cpu=list(before), extend_seq_lens=torch.tensor(lens),
            extend_seq_lens_cpu=lens, extend_start_loc=starts[:-1], extend_num_tokens=sum(lens),
            **more,
        )  # fmt: skip
        return list(self.run(batch, torch.cat(list(tokens)))[0].split(lens))

    def decode(
        self,
        rows: Sequence[int],
        tokens: Tensor,
        lengths: Sequence[int],
        padding: int | None = None,
    ) -> Tensor:
        """One token [N, ...] of each request. With padding, as a captured graph replays it: so many
        rows at the end hold no request."""
        batch = self.make_batch("DECODE", rows, lengths, T=len(rows))
        graph = padding is not None
        if graph:
            batch.num_padding = padding
        return self.run(batch, tokens, graph=graph)[0]

    def verify(self, rows: Sequence[int], tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Draft tokens [N, drafts, ...] of each request: o [N, drafts, HV, V]."""
        N, drafts = tokens.shape[:2]
        spec = SimpleNamespace(draft_token_num=drafts, ragged_verify_layout=None)
        batch = self.make_batch("TARGET_VERIFY", rows, lengths, T=N * drafts, spec_info=spec)
        return self.run(batch, tokens.flatten(0, 1))[0].unflatten(0, (N, drafts))

    def commit(self, last: Sequence[int]) -> None:
        """Take over the state after draft token last[n] of each request of the last `verify`, by
        the part of `update_mamba_state_after_mtp_verify` that also runs on a CPU."""
        cache, steps = self.pools.get_speculative_mamba2_params_all_layers(), torch.tensor(last)
        slots = self.linear.forward_metadata.mamba_cache_indices[: len(last)]
        commit = self.backend._scatter_speculative_state_with_mask
        with torch.inference_mode():
            commit(cache.temporal, cache.intermediate_ssm, slots, steps)
            commit(cache.conv[0], cache.intermediate_conv_window[0], slots, steps)

    def run(self, batch: Any, tokens: Tensor, graph: bool = False) -> Tensor:
        """o [1, T, HV, V] of the layer for a batch's tokens [T, ...]."""
        context = find("model_executor.forward_context")
        sizes = [self.shape.width, self.shape.HV, self.shape.HV]
        mixed, a, b = (x.contiguous() for x in tokens.split(sizes, -1))
        with (
            torch.inference_mode(),
            context.forward_context(context.ForwardContext(attn_backend=self.backend)),
        ):
            if graph:
                self.backend.init_forward_metadata_out_graph(batch)
            else:
                self.backend.init_forward_metadata(batch)
            o: Tensor = self.layer(batch, mixed, a, b)
        return o.clone()

    def truth(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """By the definition, in float64, of a request's tokens from its first one: o [T, HV, V],
        and the state after each token [T, HV, V, K]."""
        s, layer = self.shape, self.layer
        mixed, a, b = tokens.double().split([s.width, s.HV, s.HV], -1)
        past = torch.nn.functional.pad(mixed.mT[None], (3, 0))
        weight = layer.conv_weights.double()[:, None]
        mixed = torch.nn.functional.silu(
            torch.nn.functional.conv1d(past, weight, groups=s.width)[0].mT
        )
        q, k, v = mixed[None].split([s.H * s.K, s.H * s.K, s.HV * s.V], -1)
        o, states = run_step_definition(
            {
                "q": q.unflatten(-1, (s.H, s.K)), "k": k.unflatten(-1, (s.H, s.K)),
                "v": v.unflatten(-1, (s.HV, s.V)), "g": a[None], "beta": b[None],
                "A_log": layer.A_log, "dt_bias": layer.dt_bias, **RAW,
                "state": q.new_zeros(1, s.HV, s.V, s.K), "state_indices": torch.zeros(1).int(),
                "output_states": q.new_zeros(len(tokens), s.HV, s.V, s.K),
                "output_indices": torch.arange(len(tokens))[None],
            }
        )  # fmt: skip
        return o[0], states
