"""Tests that are too slow for a machine without a GPU, beside others of their kind that run there.
On a machine with a GPU they run, or what they emulate does; GDN_SLOW_TESTS=1 runs them everywhere.
"""

from __future__ import annotations

import re

SLOW = re.compile(
    "|".join(
        (
            # Triton's interpreter
            r"test_agreement\.py::.*triton-cpu-(channels|head-dim|packed|resets|lower|steep|model)"
            r".*float16",
            r"test_agreement\.py::.*triton-cpu-channels.*float32",
            r"test_agreement\.py::.*triton-cpu-(grouped-heads-b|head-dim.*bf|packed-b|resets.*bf)",
            r"test_agreement\.py::test_gradient_of.*triton-cpu-.*float16",
            r"test_decode\.py::test_(agrees.*triton-cpu-.*-float16\]|step_by.*triton-cpu-1)",
            r"test_transformers\.py::test_(chunked|greedy).*triton-cpu",
            r"test_float16_ranges\.py::.*cpu-channels-large.*-triton",
            r"test_(agreement|decode)\.py::.*triton-cpu-(channels-)?(wide-values|olmo)",
            r"test_agreement\.py::.*triton-cpu-channels-(v-first|model|lower|no-decay|weak|corr)",
            r"test_channels\.py::.*triton-cpu-(1|2|15|16|31|63|64)\]",
            r"test_channels\.py::test_(equal|prefill|a_lower).*triton-cpu",
            r"test_close_keys\.py::.*cpu-channels-cosine-1-beta-2-torch\.bfloat16-triton",
            r"test_prefill\.py::.*triton-cpu-.*-(bfloat16|float16)\]",
            r"test_prefill_random\.py::.*triton-cpu-([6-9]|1\d|2\d)\]",
            r"test_batch_invariance\.py::.*(parts|pool).*triton-cpu",
            r"test_batch_invariance\.py::.*triton-cpu-([1-9]|1\d|channels.*)\]",
            r"test_batch_invariance\.py::.*torch-cpu-([4-9]|1\d)\]",
            r"test_triton\.py::(test_compiles_for\[(80|90-fp32)|test_head_dims.*bfloat16"
            r"|test_pieces.*(cpu-(dense|packed|correlated|channels.*bf|fused.*float32)))",
            r"test_prefill\.py::test_(opcheck\[triton-cpu-2|compiles.*triton-cpu-False)",
            r"test_unusual_inputs\.py::test_negated.*triton-cpu-True",
            r"test_strided_inputs\.py::.*triton-cpu-dense",
            r"test_(ops|channels_ops|prefill)\.py::.*triton-cpu-(True-dense|dense|packed-b.*|0|1)\]",
            r"test_transformers\.py::.*triton-cpu-(lara|olmo|qwen3_5|qwen4)",
            r"test_padded_packs\.py::.*triton-cpu-.*-1\]",
            r"test_(properties|channels)\.py::test_(repeated|is_linear|strided).*triton-cpu",
            r"test_examples\.py::test_serving.*triton-cpu-reuse",
            r"test_layer_parts\.py::test_convolution\[fla-cpu-.*dtype1",
            r"test_transformers_layers\.py::.*on_kernels\[cpu-kimi",
            # emulated and compiled kernels
            r"test_prebuilt\.py::test_launches_fit",
            r"test_prover\.py::.*(gradients|states|reverse)",
            r"test_tilelang\.py::test_backward_neither.*many",
            r"test_tilelang_decode\.py::test_compiles.*(channels-|olmo-|wide-)",
            r"test_tilelang_exchange\.py::test_(?!warmup)",
            r"test_exchange\.py::.*weak",
            r"test_tilelang_pool\.py::test_bounds.*two",
            r"test_tilelang_strided\.py::test_batches",
            r"test_tilelang_pool\.py::test_(suite|pieces|one_kernel_in|a_pool|parameters|neither.*(all|two)"
            r"|.*(early|float16))",
            r"test_tilelang_emulated\.py::test_strides.*heads_first",
            r"test_tilelang_channels\.py::test_(decode.*(\[(ch|p|s|e|h)|torch\.float16)|float16|tokens"
            r"|neither|a_warp|other|close|a_sum|forward_as|forward\[(?!dense-torch\.bfloat16-late))",
            r"test_tilelang_channel_gradients\.py::test_(?!gradients.*small-torch\.bfloat16-late|auto)",
            r"test_tilelang_forgetting\.py::.*(early\]|False-late|64-dtype0|mixed|True-1\.0|dtype[13]"
            r"|large_float16)",
            r"test_tilelang_forgotten_gradients\.py::test_(agrees.*(early|packed|channels|fused)|gradients|no.*case1)",
            r"test_tilelang_fused\.py::test_float16_ranges.*(raw-rows|large-values)",
            r"test_tilelang_fused_tasks\.py::.*(\[(plain|float16|from-zero|everything|whole)|(short|dense)-early"
            r"|slow\[([0-8]|15))",
            r"test_tilelang_emulated\.py::test_(agrees.*(correlated|strong|head-dim|wide|olmo)"
            r"|pieces.*early|backward.*parts|two_warp|summaries)",
            r"test_tilelang_emulated\.py::test_(close_keys.*(torch\.float16|keys-torch)"
            r"|float16_ranges.*(raw-rows|large-values|in_pieces)|tokens_past.*pieces"
            r"|summaries.*early|prepare_runs_beside.*False"
            r"|decode.*(wide|olmo|padded-pack|last-elsewhere|sixteen-tokens|no-leading))",
        )
    )
)
