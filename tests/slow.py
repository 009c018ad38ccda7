"""Tests that are too slow for a machine without a GPU, beside others of their kind that run there.
On a GPU they run, or what they emulate does; GDN_SLOW_TESTS=1 runs them everywhere."""

from __future__ import annotations

import re

SLOW = re.compile(
    "|".join(
        (
            # Triton's interpreter
            r"test_agreement\.py::.*triton-cpu-channels.*(float16|float32)",
            r"test_agreement\.py::.*triton-cpu-channels-(v-first|model|lower|no-decay|weak|corr)",
            r"test_channels\.py::.*triton-cpu-(1|2|15|16|31|63|64)\]",
            r"test_channels\.py::test_(equal|prefill|a_lower).*triton-cpu",
            r"test_close_keys\.py::.*cpu-channels-cosine-1-beta-2-torch\.bfloat16-triton",
            r"test_prefill\.py::.*triton-cpu-.*-(bfloat16|float16)\]",
            r"test_(prefill|decode)_random\.py::.*triton-cpu-([6-9]|1\d|2\d)\]",
            r"test_decode\.py::.*triton-cpu-(channels|each|last|no-leading|sixteen|float16)"
            r".*-(float16|float32)\]",
            r"test_examples\.py::test_serving.*triton-cpu-reuse",
            # emulated kernels
            r"test_tilelang_forgetting\.py::.*(early\]|False-late|64-dtype0|mixed|True-1\.0)",
            r"test_tilelang_emulated\.py::test_(close_keys.*(2-torch\.float16|keys-torch\.bfloat16)"
            r"|float16_ranges.*(raw-rows|large-values|in_pieces)|tokens_past.*pieces"
            r"|summaries.*early|decode.*(padded-pack|last-elsewhere|sixteen-tokens|no-leading))",
        )
    )
)
