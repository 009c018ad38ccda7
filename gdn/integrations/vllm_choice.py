"""Whether gdn serves a layer of vLLM, on which backends, and what it compiles for that."""

from __future__ import annotations

import importlib
import os
from math import prod
from typing import Any

import torch
from torch import Tensor

import gdn
from gdn.api import warmup
from gdn.dispatch import framework_request
from gdn.integrations.vllm import say
from gdn.integrations.vllm_batch import Rule, Sample, run_sample, samples

CACHE_MODES = ("none", "align")
"""vLLM's mamba_cache_mode: without prefix caching, and with it."""

_answers: dict[tuple[object, ...], str] = {}  # why a kind of layer is refused, "" if it is not
_cold: list[Sample] = []  # what the first profile run compiles


def find_refusal(config: Any) -> str:
    """Why gdn leaves all of a model's layers to vLLM; empty if it does not."""
    cache = config.cache_config
    if cache.mamba_cache_mode not in CACHE_MODES:
        return f"mamba_cache_mode must be none or align, got {cache.mamba_cache_mode!r}"
    if cache.use_replayssm:
        return "use_replayssm must be off, got on; its caches hold other states"
    if "VLLM_GDN_DECODE_KERNEL" in os.environ:
        return "VLLM_GDN_DECODE_KERNEL must not be set, it asks for vLLM's own"
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        return "VLLM_BATCH_INVARIANT must be off, got on; gdn's calls have a mode of their own"
    return find_prefill_refusal(config)


def find_prefill_refusal(config: Any) -> str:
    """Why gdn leaves prefill to vLLM; empty if it does not."""
    options = config.additional_config
    for option in ("gdn_prefill_backend", "kda_prefill_backend"):
        backend = options.get(option, "auto") if isinstance(options, dict) else "auto"
        if backend != "auto":
            return f"{option} must be auto, got {backend!r}, which asks for vLLM's own"
    return ""


def make_rule(
    layer: Any, config: Any, sizes: tuple[int, int, int, int], per_channel: bool, **options: Any
) -> Rule | None:
    """The rule of a layer with these H, HV, K, V on this rank and these keywords of gdn's calls; or
    None, after a line in the log, if gdn leaves the layer to vLLM."""
    name = type(layer).__mro__[1].__name__
    try:
        current = importlib.import_module("vllm.platforms").current_platform.current_device()
        device = torch.device(current)  # the layer's own may still be meta
        rule = Rule(*sizes, options | {"backend": framework_request(device)[0]})
        reason = find_refusal(config) or _prepare(name, layer, config, rule, device, per_channel)
    except Exception as error:  # vLLM must start without gdn
        reason = f"{type(error).__name__}: {error}"
    if reason:
        say(f"gdn leaves {name} to vLLM: {reason}")
        return None
    return rule


def _prepare(
    name: str, layer: Any, config: Any, rule: Rule, device: torch.device, per_channel: bool
) -> str:
    """Compile what the layer needs, once for layers that are alike. Why it cannot run; empty if it
    can."""
    stored = config.cache_config.mamba_cache_mode == "align"
    windows, dtypes = layer.get_state_shape()[0], layer.get_state_dtype()
    key = (
        name, *rule[:4], *rule.options.items(), windows, dtypes, config.model_config.dtype,
        layer.num_spec, stored,
    )  # fmt: skip
    if key not in _answers:
        page = prod(rule.state_shape) + prod(windows) * dtypes[0].itemsize // dtypes[1].itemsize
        pool = torch.zeros(2, page, dtype=dtypes[1], device=device)
        pool = pool[:, : prod(rule.state_shape)].view(2, *rule.state_shape)
        gate = {n: torch.zeros_like(x, device=device).detach() for n, x in gate_of(layer).items()}
        tried = rule._replace(options=rule.options | gate)
        calls = list(
            samples(tried, pool, config.model_config.dtype, per_channel, 1 + layer.num_spec, stored)
        )
        try:
            backends = {warmup(**x.tokens, **x.keywords, prefill=x.prefill) for x in calls}
        except Exception as error:
            _answers[key] = str(error)
        else:
            _answers[key] = ""
            _cold.extend(calls)
            say(f"gdn {gdn.__version__} runs {name} on {' and '.join(sorted(backends))}")
    return _answers[key]


def gate_of(layer: Any) -> dict[str, Tensor]:
    """The parameters of a layer's gate, as keywords."""
    return {"A_log": layer.A_log, "dt_bias": layer.dt_bias}


def compile_pending() -> None:
    """Run what the layers made so far need, so that it is compiled."""
    while _cold:
        run_sample(_cold.pop())
