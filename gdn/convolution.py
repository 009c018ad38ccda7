"""The short convolution of a layer: causal, depthwise, with SiLU, within each sequence.

    y_t = silu(sum_j weight_j x_{t - W + 1 + j}),    j = 0 .. W - 1

Sums are float32's. causal-conv1d or flash-linear-attention's Triton kernel run it where they are
installed, else PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.parts import Choice, load, refuse_kernels

CAUSAL_CONV1D, FLA, TORCH = "causal-conv1d", "fla", "torch"
_MODULES = {CAUSAL_CONV1D: "causal_conv1d", FLA: "fla.modules.causal_conv1d.ops"}
_CHUNK = 64
"""Tokens that fla's kernel takes at a time."""


def choose(x: Tensor, taps: int) -> Choice:
    """What runs `short_convolution` on x [B, T, D], packed or from a cache or neither."""
    if reason := refuse_kernels(x):
        return Choice(TORCH, (reason,))
    reasons = []
    if load(_MODULES[CAUSAL_CONV1D]) is None:
        reasons.append("causal-conv1d is not installed")
    elif not 2 <= taps <= 4:
        reasons.append(f"causal-conv1d takes 2 to 4 taps, not {taps}")
    elif any(n % 8 for n in (x.shape[2], x.stride(0), x.stride(1))) or x.stride(2) != 1:
        reasons.append("causal-conv1d takes channels and strides that are multiples of 8")
    else:
        return Choice(CAUSAL_CONV1D)
    if load(_MODULES[FLA]) is not None:
        return Choice(FLA, tuple(reasons))
    return Choice(TORCH, (*reasons, "fla is not installed"))


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    cache: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Convolve whole sequences. Differentiable in x and weight.

    Args:
        x: [B, T, D], any floating dtype. Tokens and sequences may have any strides.
        weight: [D, W]; the last tap is the newest token's.
        cache: the last W inputs before x [B, D, W], the oldest first; those of x replace them in
            place. None is zeros.
        cu_seqlens: sequences packed along T, as in `gdn.gated_delta_net`; not together with a
            cache. Tokens past its end are padding, whose results are finite and mean nothing.

    Returns:
        y [B, T, D] in x's dtype.
    """
    if not x.shape[1]:
        return x
    if torch.compiler.is_compiling():
        y = _by_shifts(x, weight, cache, cu_seqlens)
    else:
        y = _RUN[choose(x, weight.shape[1]).engine](x, weight, cache, cu_seqlens)
    if cache is not None:
        _remember(x, cache)
    return y


def choose_step(x: Tensor, taps: int, cache: Tensor) -> Choice:
    """What runs `convolve_step` on x [B, T, D]."""
    if reason := refuse_kernels(x):
        return Choice(TORCH, (reason,))
    if x.dtype != cache.dtype:
        return Choice(TORCH, (f"kernels need a cache of x's dtype, not {cache.dtype}",))
    reasons = []
    if load(_MODULES[CAUSAL_CONV1D]) is None:
        reasons.append("causal-conv1d is not installed")
    elif not 2 <= taps <= 4:
        reasons.append(f"causal-conv1d takes 2 to 4 taps, not {taps}")
    else:
        return Choice(CAUSAL_CONV1D)
    if load(_MODULES[FLA]) is None:
        reasons.append("fla is not installed")
    elif x.shape[1] != 1 or not cache.is_contiguous():
        reasons.append("fla takes one token and a contiguous cache")
    else:
        return Choice(FLA, tuple(reasons))
    return Choice(TORCH, tuple(reasons))


def convolve_step(x: Tensor, weight: Tensor, cache: Tensor) -> Tensor:
    """`short_convolution` of a few tokens after those in the cache, without gradients."""
    if not x.shape[1]:
        return x
    engine = choose_step(x, weight.shape[1], cache).engine
    module: Any = None if engine == TORCH else load(_MODULES[engine])
    y: Tensor
    if engine == CAUSAL_CONV1D:
        y = module.causal_conv1d_update(x.mT, cache, weight, activation="silu").mT
    elif engine == FLA:
        y, _ = module.causal_conv1d_update(x[:, 0], cache, weight=weight, activation="silu")
        y = y[:, None]
    else:
        run = _by_shifts if torch.compiler.is_compiling() else _by_torch
        y = run(x, weight, cache, None)
        _remember(x, cache)
    return y


def convolve_packed(
    convolution: Callable[[Tensor], Tensor], x: Tensor, cu_seqlens: Tensor, taps: int
) -> Tensor:
    """Run `convolution`, which is causal, on [1, channels, T] within each packed sequence.

    It gets the sequences with taps - 1 zeros between neighbours, and returns a tensor of the same
    shape. Its values are those that it gives for each sequence alone. The host never waits for the
    device.
    """
    rows, inner = x.mT, cu_seqlens[1:-1]
    tokens = torch.arange(rows.shape[1], device=x.device, dtype=inner.dtype)
    places = (tokens + (taps - 1) * torch.searchsorted(inner, tokens, right=True)).long()
    apart = rows.new_zeros((rows.shape[0], len(tokens) + (taps - 1) * len(inner), rows.shape[2]))
    apart = apart.index_copy(1, places, rows)
    return convolution(apart.mT).mT.index_select(1, places).mT


def _remember(x: Tensor, cache: Tensor) -> None:
    """Put the last inputs into the cache."""
    last, kept = x.detach().mT, cache.shape[2] - x.shape[1]
    if kept > 0:
        last = torch.cat([cache[..., -kept:].to(x.dtype), last], -1)
    cache.copy_(last[..., -cache.shape[2] :])


def _by_causal_conv1d(
    x: Tensor, weight: Tensor, cache: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    options: dict[str, Any] = {}
    if cache is not None:  # [B, D, W - 1], its channels side by side
        options["initial_states"] = cache[..., 1:].to(x.dtype).mT.contiguous().mT
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[1], device=x.device, dtype=cu_seqlens.dtype)
        options["seq_idx"] = torch.searchsorted(cu_seqlens[1:-1], tokens, right=True).int()[None]
    module: Any = load(_MODULES[CAUSAL_CONV1D])
    y: Tensor = module.causal_conv1d_fn(x.mT, weight, activation="silu", **options)
    return y.mT


def _by_fla(x: Tensor, weight: Tensor, cache: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    options: dict[str, Any] = {}
    if cache is not None:
        # a copy, since backward reads it and `short_convolution` then writes to the cache
        options["initial_state"] = cache.to(x.dtype, copy=True).contiguous()
    if cu_seqlens is not None:  # padding is one more sequence, so that its gradients are written
        bounds = F.pad(cu_seqlens, (0, 1), value=x.shape[1])
        options |= {"cu_seqlens": bounds, "chunk_indices": _list_chunks(bounds, x.shape[1])}
    module: Any = load(_MODULES[FLA])
    y: Tensor = module.causal_conv1d(x, weight, activation="silu", **options)[0]
    return y


def _list_chunks(bounds: Tensor, T: int) -> Tensor:
    """fla's table of chunks [chunks, 2]: the sequence of each, and its number there. Its length
    follows from T and the number of sequences, so that the host need not wait; what is left over
    lies past the end of the last sequence."""
    counts = (bounds.diff() + _CHUNK - 1) // _CHUNK
    ends = counts.cumsum(0).to(counts.dtype)
    chunks = torch.arange(T // _CHUNK + len(counts), device=bounds.device, dtype=counts.dtype)
    sequence = torch.searchsorted(ends, chunks, right=True).clamp(max=len(counts) - 1)
    return torch.stack([sequence.to(counts), chunks - (ends - counts)[sequence]], 1)


def _by_torch(x: Tensor, weight: Tensor, cache: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    def convolution(rows: Tensor) -> Tensor:
        return F.silu(F.conv1d(rows, weight[:, None], groups=rows.shape[1]))

    rows, before = x.mT, weight.shape[1] - 1
    if cache is not None:
        return convolution(torch.cat([cache[..., 1:].to(x.dtype), rows], -1)).mT
    if cu_seqlens is None:
        return convolution(F.pad(rows, (before, 0))).mT
    packed = convolve_packed(
        lambda apart: convolution(F.pad(apart, (before, 0))), rows, cu_seqlens, weight.shape[1]
    )
    return packed.mT


def _by_shifts(
    x: Tensor, weight: Tensor, cache: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Elementwise operations alone, which Inductor fuses into one kernel."""
    T, W = x.shape[1], weight.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    if cache is None:
        rows = F.pad(x, (0, 0, W - 1, 0))
    else:
        rows = torch.cat([cache[..., 1:].to(x.dtype).mT, x], 1)
    if cu_seqlens is not None:
        tokens = torch.arange(T, device=x.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens[1:-1], tokens, right=True)
        place = (tokens - cu_seqlens[sequence])[:, None]  # within its sequence
    total = x.new_zeros((), dtype=wide)
    for tap in range(W):
        term = rows[:, tap : tap + T].to(wide) * weight[:, tap].to(wide)
        if cu_seqlens is not None:
            term = torch.where(place >= W - 1 - tap, term, 0)
        total = total + term
    return F.silu(total).to(x.dtype)


_RUN = {CAUSAL_CONV1D: _by_causal_conv1d, FLA: _by_fla, TORCH: _by_torch}
