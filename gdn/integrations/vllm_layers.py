"""gdn's subclasses of the classes of vLLM 0.33 that `gdn.integrations.vllm` replaces. Each is made
from its class's module, once vLLM has imported that."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gdn.api import gated_delta_net
from gdn.dispatch import framework_request
from gdn.integrations.vllm import say
from gdn.integrations.vllm_batch import Rule, Tokens, run_batch
from gdn.integrations.vllm_choice import (
    compile_pending,
    find_prefill_refusal,
    gate_of,
    make_rule,
)
from gdn.problem import CHUNK

_context = importlib.import_module("vllm.forward_context")
_caches = importlib.import_module("vllm.model_executor.layers.mamba.mamba_utils")
_convolution = importlib.import_module("vllm.model_executor.layers.mamba.ops.causal_conv1d")
_checkpoint = importlib.import_module("vllm.model_executor.layers.mamba.checkpoint")
_graphs = importlib.import_module("vllm.compilation.breakable_cudagraph")


def run_layer(layer: Any, rule: Rule, qkv: Tensor, gate: Tensor, beta: Tensor, out: Tensor) -> bool:
    """The short convolution, by vLLM, and the rule of the batch in vLLM's context: qkv [T, ...],
    raw gate [T, HV] or [T, HV, K], raw beta [T, HV], out [T, HV, V].

    False in a profile run, which has no batch: kernels are compiled then, before vLLM gives the
    GPU's memory to its caches.
    """
    batches = _context.get_forward_context().attn_metadata
    batch = batches.get(layer.prefix) if isinstance(batches, dict) else None
    if batch is None:
        compile_pending()
        return False
    rule = rule._replace(options=rule.options | gate_of(layer))
    convolve = Convolution(layer, batch)
    run_batch(batch, Tokens(qkv, gate, beta), rule, convolve, layer.kv_cache[1], out)
    return True


class Convolution:
    """A layer's short convolution of a batch, by vLLM, on the layer's pool of windows."""

    def __init__(self, layer: Any, batch: Any) -> None:
        self.batch = batch
        state, weight = layer.kv_cache[0], layer.conv1d.weight
        self.windows = state if _caches.is_conv_state_dim_first() else state.mT
        self.weight = weight.view(weight.size(0), weight.size(2))
        self.bias, self.activation = layer.conv1d.bias, layer.activation

    def speculative(self, x: Tensor) -> Tensor:
        """Of the steps of several tokens; x [T, channels]."""
        batch, N = self.batch, self.batch.num_spec_decodes
        slots = batch.spec_state_indices_tensor
        return self._update(
            x, slots[:N, 0], num_accepted_tokens=batch.num_accepted_tokens[:N],
            query_start_loc=batch.spec_query_start_loc[: N + 1], max_query_len=slots.size(1),
        )  # fmt: skip

    def others(self, x: Tensor) -> Tensor:
        """Of plain decodes and prefills, whose checkpoints it stores; x [T, channels]."""
        batch, slots = self.batch, self.batch.non_spec_state_indices_tensor
        if not batch.num_prefills:
            return self._update(x, slots[: len(x)])
        bounds = batch.non_spec_query_start_loc
        y: Tensor = _convolution.causal_conv1d_fn(
            x.T, self.weight, self.bias, self.windows, bounds, cache_indices=slots,
            has_initial_state=batch.has_initial_state, activation=self.activation, metadata=batch,
        )  # fmt: skip
        if batch.checkpoint is not None:
            _checkpoint.MambaPrefillCheckpointExporter(self.weight.size(1) - 1).export(
                batch.checkpoint, raw_qkv=x, conv_state=self.windows, cu_seqlens=bounds
            )
        return y.T

    def _update(self, x: Tensor, slots: Tensor, **steps: Any) -> Tensor:
        y: Tensor = _convolution.causal_conv1d_update(
            x, self.windows, self.weight, self.bias, self.activation, conv_state_indices=slots,
            out=torch.empty_like(x, memory_format=torch.contiguous_format), **steps,
        )  # fmt: skip
        return y


def _make_core(
    known: type, options: tuple[str, ...] = (), settle: Callable[[Any, Any], None] | None = None
) -> type:
    """A subclass of a layer of vLLM with the convolution and the rule of its core by `run_layer`.
    options: attributes that are keywords of gdn's calls; settle: called with the layer and vLLM's
    configuration if gdn serves the layer."""

    class Core(known):  # type: ignore[misc]
        def __init__(self, config: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, vllm_config, *args, **kwargs)
            heads = (x // self.tp_size for x in (self.num_k_heads, self.num_v_heads))
            sizes = (*heads, self.head_k_dim, self.head_v_dim)
            given = {name: getattr(self, name) for name in options}
            self.gdn_rule = make_rule(self, vllm_config, sizes, False, **given)
            if self.gdn_rule is not None and settle is not None:
                settle(self, vllm_config)

        def _forward_core(
            self, mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor
        ) -> None:
            if self.gdn_rule is None:
                super()._forward_core(mixed_qkv, b, a, core_attn_out)
            else:
                run_layer(self, self.gdn_rule, mixed_qkv, a, b, core_attn_out)

    return Core


def _settle_qwen(layer: Any, vllm_config: Any) -> None:
    layer.enable_fused_gdn_spec_decode = False  # a kernel of the whole core, and the norm
    if vllm_config.cache_config.mamba_cache_mode == "align":
        # the scheduler then leaves prefills whole, whatever vLLM's own backend would be
        layer._checkpoint_alignment = CHUNK


def make_qwen(module: ModuleType) -> type:
    """Of Qwen3-Next, Qwen3.5, Qwen4-Exp and what else has its layer."""
    return _make_core(module.QwenGatedDeltaNetAttention, settle=_settle_qwen)


def make_olmo(module: ModuleType) -> type:
    """Of OLMo Hybrid."""
    return _make_core(module.OlmoHybridGatedDeltaNetAttention, ("allow_neg_eigval",))


def make_kimi(module: ModuleType) -> type:
    """Of Kimi Linear, whose decay is per channel."""

    class Kimi(module.KimiGatedDeltaNetAttention):  # type: ignore[misc, name-defined]
        """vLLM's layer, with the convolution and the rule of its core by `run_layer`."""

        def __init__(self, config: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, vllm_config, *args, **kwargs)
            sizes = (self.local_num_heads, self.local_num_heads, self.head_dim, self.head_dim)
            bound = {"gate_lower_bound": self.gate_lower_bound}
            self.gdn_rule = make_rule(self, vllm_config, sizes, True, **bound)

        @_graphs.eager_break_during_capture
        def _forward(
            self, mixed_qkv: Tensor, g1: Tensor, g2: Tensor, beta: Tensor, core_attn_out: Tensor
        ) -> None:
            if self.gdn_rule is None:
                super()._forward(mixed_qkv, g1, g2, beta, core_attn_out)
            elif run_layer(self, self.gdn_rule, mixed_qkv, g1[0], beta[0], core_attn_out[0]):
                core_attn_out.copy_(self.o_norm(core_attn_out, g2))

    return Kimi


def make_prefill(module: ModuleType) -> type:
    """Of vLLM's chunked prefill, between its own gather and scatter of states."""

    class Prefill(module.ChunkGatedDeltaRule):  # type: ignore[misc, name-defined]
        """vLLM's function, by `gdn.gated_delta_net` where a backend can run it."""

        _forward_method: Callable[..., Any]

        def __init__(self) -> None:
            super().__init__()
            self.gdn_original = self._forward_method
            config = importlib.import_module("vllm.config").get_current_vllm_config()
            reason = find_prefill_refusal(config)
            if reason:
                say(f"gdn leaves ChunkGatedDeltaRule to vLLM: {reason}")
                return
            self._forward_method = self.forward_gdn
            # what the layer asks for: FlashInfer's checkpoints would go past this function
            self.gdn_prefill_backend = "triton"

        def forward_gdn(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor,
            beta: Tensor,
            initial_state: Tensor,
            output_final_state: bool,
            cu_seqlens: Tensor | None = None,
            use_qk_l2norm_in_kernel: bool = True,
            core_attn_out: Tensor | None = None,
            **others: Any,
        ) -> Any:
            """[1, T, heads, size] each, log gates and beta [1, T, HV], states [N, HV, V, K]: o, and
            the final states or None."""
            given: dict[str, Any] = {
                "q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state,
                "output_final_state": output_final_state, "cu_seqlens": cu_seqlens,
                "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
            }  # fmt: skip
            try:
                o, state = gated_delta_net(
                    **given, state_v_first=True, backend=framework_request(q.device)[0]
                )
            except Exception as error:  # a compiler's, say; vLLM's own function can run the call
                say(f"gdn leaves ChunkGatedDeltaRule to vLLM: {error}")
                self._forward_method = self.gdn_original
                return self._forward_method(**given, core_attn_out=core_attn_out, **others)
            if core_attn_out is not None:
                core_attn_out.view(-1)[: o.numel()].copy_(o.reshape(-1))
            return o, state

    return Prefill


MAKERS: dict[str, Callable[[ModuleType], type]] = {
    "QwenGatedDeltaNetAttention": make_qwen,
    "OlmoHybridGatedDeltaNetAttention": make_olmo,
    "KimiGatedDeltaNetAttention": make_kimi,
    "ChunkGatedDeltaRule": make_prefill,
}
"""What makes the subclass of each class."""
