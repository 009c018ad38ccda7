"""Which backend of gdn runs the calls of an SGLang model runner: the calls are tried, on sequences
without a slot, which also compiles their kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn.dispatch import BackendUnsupportedError, framework_request, parse_request
from gdn.integrations.sglang_kernels import Kernel, split_projection
from gdn.problem import CHUNK
from gdn.registry import UnknownBackendError


class Layer(NamedTuple):
    """What one layer of a model runner works on: its pool [slots, HV, V, K], the states of draft
    tokens [rows, steps, HV, V, K] or None, the number of heads of q and k, and q's dtype."""

    pool: Tensor
    drafts: Tensor | None
    H: int
    dtype: torch.dtype


def find_layer(backend: Any, model_runner: Any) -> Layer | None:
    """The first layer of SGLang's `GDNAttnBackend`; None if this runner has none."""
    cache = backend.req_to_token_pool.mamba_pool.mamba_cache
    if not len(cache.temporal):
        return None
    pool, drafts = cache.temporal[0], getattr(cache, "intermediate_ssm", None)
    HV, V, K = pool.shape[1:]
    H = (cache.conv[0].shape[2] - HV * V) // (2 * K)  # the convolution runs over q, k and v
    return Layer(pool, None if drafts is None else drafts[0], H, model_runner.dtype)


def find_backend(phase: str, layer: Layer) -> tuple[str, list[str]]:
    """The first backend of the request in force that runs the calls of a phase ("decode",
    "prefill", "verify"), and the reasons of those before it. "" if there is none."""
    request, _ = framework_request(layer.pool.device)
    try:
        names = parse_request(request) if request else []
    except UnknownBackendError as error:
        return "", [str(error)]
    reasons: list[str] = []
    for name in names:
        try:
            with torch.inference_mode():
                warm_up(phase, layer, Kernel(name))
            return name, reasons
        except BackendUnsupportedError as error:
            reasons += [f"{name}: {'; '.join(why)}" for name, why in error.reasons.items()]
        except Exception as error:  # a compiler's, say: the log names it, and the next one is tried
            first = str(error).partition("\n")[0]
            reasons.append(f"{name}: {type(error).__name__}: {first}")
    return "", reasons or [f"no backend in {request!r} is meant for a GPU"]


def warm_up(phase: str, layer: Layer, kernel: Kernel) -> None:
    """Make a phase's calls for one sequence, and for two whose length is no multiple of 64. They
    have no slots, so that no state changes."""
    pool, drafts, H, dtype = layer
    HV, V, K = pool.shape[1:]
    steps = 1 if drafts is None else drafts.shape[1]
    for N, longest in ((1, CHUNK), (2, CHUNK + 1)):
        T = {"decode": 1, "prefill": longest, "verify": steps}[phase]
        mixed = pool.new_zeros(N * T, 2 * H * K + HV * V, dtype=dtype)
        tokens = split_projection(mixed[None], HV, K, V)
        a, b = mixed.new_zeros(2, N * T, HV)
        zeros = pool.new_zeros(HV, dtype=torch.float32)
        nowhere = torch.full((N,), -1, dtype=torch.int32, device=pool.device)
        place: dict[str, Any] = {"ssm_states": pool, "cache_indices": nowhere}
        bounds = torch.arange(N + 1, dtype=torch.int32, device=pool.device) * T
        if phase == "decode":
            kernel.packed_decode(
                mixed, a, b, A_log=zeros, dt_bias=zeros, scale=K**-0.5, num_v_heads=HV,
                head_v_dim=V, **place,
            )  # fmt: skip
            continue
        place["query_start_loc"] = bounds
        if phase == "verify":
            assert drafts is not None
            kernel.target_verify(
                zeros, zeros, *tokens, a, b, intermediate_states_buffer=drafts,
                intermediate_state_indices=nowhere.clamp(min=0), cache_steps=steps, **place,
            )  # fmt: skip
            continue
        decay = a[None].float()
        states = pool.new_zeros(N, HV, V, K, dtype=torch.float32)
        kernel.extend(*tokens, decay, decay, **place)
        kernel.extend(*tokens, decay, decay, track_state=states, track_chunk_idx=nowhere, **place)
