"""The Gated DeltaNet layer of Qwen3-Next and Qwen3.5 (arXiv 2412.06464, figure 1) as a torch
module, and its cache."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn import convolution, gated_norm
from gdn.api import explain, gated_delta_net
from gdn.context_parallel import ContextParallel
from gdn.convolution import convolve_step, short_convolution
from gdn.definition import initialize_gates
from gdn.distributed import conv_halo
from gdn.gated_norm import GatedRMSNorm
from gdn.parts import LayerExplanation
from gdn.recomputation import copy_state, refuse_recomputation
from gdn.serving import gated_delta_net_decode

__all__ = ["Cache", "GatedDeltaNet", "GatedRMSNorm", "LayerExplanation"]

_STEP = 8
"""Tokens up to which a call with a cache is a decode step rather than a sequence."""
_PROJECTIONS = ("qkv", "z", "b", "a")
"""The parts of `in_proj`, in this order: Qwen3.5's layer has a projection for each."""


class Cache:
    """What a layer remembers of B sequences between calls, updated in place.

    conv [B, channels, conv_size]: the last inputs of the short convolution, the oldest first. state
    [B, HV, K, V] in float32 (float64 for a layer in float64).

    Not a dataclass: FSDP's mixed precision replaces the tensors in one by copies in its
    param_dtype, so that updates would be lost.
    """

    def __init__(self, conv: Tensor, state: Tensor) -> None:
        self.conv, self.state = conv, state


class GatedDeltaNet(nn.Module):
    """Projections, a causal depthwise convolution with SiLU over q, k and v, the gated delta rule
    with L2 norm, gate and sigmoid fused, a gated RMS norm, and a projection back.

    One projection `in_proj` gives q, k, v, the norm's gate z, and the logits b of beta and a of the
    decay; q, k, v, z, b and a are read where they lie in its output. The other parameters have the
    names of Qwen3.5's layer in transformers. A state dict of that layer, or of Qwen3-Next's (whose
    projections are interleaved by head), loads as it is; `qwen_state_dict` is the way back.

    The convolution runs on causal-conv1d or fla, the norm on Triton, where they are installed and
    the input is on a GPU, else both on PyTorch (`explain`). Under torch.compile PyTorch runs both,
    so that the layer is one graph.

    A new layer's linear and convolution weights are those of torch's layers, the norm's weight is
    ones, and the gates are those of `gdn.definition.initialize_gates`.

    The module and its submodules have `reset_parameters`, so that a layer built on the meta device
    can be sharded (`fully_shard`), given memory (`to_empty`) and then initialised.

    Args:
        hidden_size: width of the input and output.
        num_k_heads, num_v_heads: H and HV; HV is a multiple of H.
        head_k_dim, head_v_dim: K and V.
        conv_size: taps of the convolution.
        norm_eps: of the gated RMS norm.
        allow_neg_eigval, backend: as in `gdn.gated_delta_net`.
        device, dtype: of the parameters, as in torch's layers.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int = 128,
        head_v_dim: int = 128,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
        allow_neg_eigval: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.H, self.HV, self.K, self.V = num_k_heads, num_v_heads, head_k_dim, head_v_dim
        self.conv_size, self.backend = conv_size, backend
        self.sizes = [self.H * self.K, self.H * self.K, self.HV * self.V]
        self.options: dict[str, Any]
        self.options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True}
        self.options |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": allow_neg_eigval}
        channels, values = sum(self.sizes), self.HV * self.V
        self.widths = [channels, values, self.HV, self.HV]
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        linear: Any = functools.partial(nn.Linear, bias=False, **own)
        self.in_proj = linear(hidden_size, sum(self.widths))
        self.conv1d = nn.Conv1d(channels, channels, conv_size, groups=channels, bias=False, **own)
        self.A_log = nn.Parameter(torch.empty(self.HV, **own))
        self.dt_bias = nn.Parameter(torch.empty(self.HV, **own))
        self.norm = GatedRMSNorm(self.V, norm_eps, **own)
        self.out_proj = linear(values, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the layer's own parameters (`gdn.definition.initialize_gates`). Submodules
        have a `reset_parameters` of their own."""
        initialize_gates(self.A_log, self.dt_bias)

    def extra_repr(self) -> str:
        sizes = (
            f"hidden_size={self.in_proj.in_features}, num_k_heads={self.H}, "
            f"num_v_heads={self.HV}, head_k_dim={self.K}, head_v_dim={self.V}, "
            f"conv_size={self.conv_size}"
        )
        options = {"allow_neg_eigval": self.options["allow_neg_eigval"], "backend": self.backend}
        return sizes + "".join(f", {name}={x!r}" for name, x in options.items() if x)

    def make_cache(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cache:
        """An empty cache for `batch` sequences: ordinary tensors of full size, also when the
        parameters are sharded.

        device, dtype: where the layer computes, and in which dtype; None means the parameters'. The
        defaults suit mixed precision; FSDP's CPU offload needs device=. conv has this dtype, state
        float32 (float64 with float64).
        """
        weight = self.conv1d.weight
        device = weight.device if device is None else device
        dtype = weight.dtype if dtype is None else dtype
        conv = torch.zeros(batch, sum(self.sizes), self.conv_size, device=device, dtype=dtype)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        state = torch.zeros(batch, self.HV, self.K, self.V, device=device, dtype=exact)
        return Cache(conv, state)

    def forward(
        self,
        x: Tensor,
        *,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        cp: ContextParallel | None = None,
    ) -> Tensor:
        """y [B, T, hidden_size] from x of that shape.

        cache: go on from it, and leave in it what the next call needs; not under activation
        checkpointing, whose second run would start where the first ended. cu_seqlens: sequences
        packed along T, as in `gdn.gated_delta_net`; not together with a cache. cp: x [1, T_local,
        hidden_size] is this rank's part of the tokens, as in `gdn.gated_delta_net`; it comes
        without the other two. The parameters' gradients are the rank's share.
        """
        if cp is not None and (cache is not None or cu_seqlens is not None):
            raise ValueError(
                "cp must come without cache and cu_seqlens, got both; give the global cu_seqlens "
                "to gdn.ContextParallel"
            )
        if cache is not None and cu_seqlens is not None:
            raise ValueError("cache must come without cu_seqlens, got both; pad to a batch instead")
        if cache is not None:
            refuse_recomputation()
        step = self._is_step(x, cache)
        tensors, z = self._split(self.in_proj(x), cache, cu_seqlens, cp, step)
        if cache is not None and step:
            o = gated_delta_net_decode(**tensors, **self.options, state=cache.state)
        else:
            start = None if cache is None else cache.state
            if start is not None and torch.is_grad_enabled():
                start = copy_state(start)
            o, state = gated_delta_net(
                **tensors, **self.options, cu_seqlens=cu_seqlens, cp=cp, initial_state=start,
                output_final_state=cache is not None,
            )  # fmt: skip
            if cache is not None and state is not None:
                cache.state.copy_(state.detach())
        out: Tensor = self.out_proj(self.norm(o, z).flatten(2))
        return out

    def explain(
        self, x: Tensor, *, cache: Cache | None = None, cu_seqlens: Tensor | None = None
    ) -> LayerExplanation:
        """What would run each part of `forward(x, cache=cache, cu_seqlens=cu_seqlens)`, and why
        nothing faster does. Computes nothing, and leaves the cache as it is; `print` shows all."""
        B, T, device = *x.shape[:2], x.device.type
        dtype = self.in_proj.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        projected = x.new_empty(B, T, sum(self.widths), dtype=dtype)
        mixed, z, b, a = torch.split(projected, self.widths, -1)
        tensors = self._arguments(mixed.new_empty(mixed.shape), b, a)
        norm = gated_norm.choose(z)
        if cache is not None and self._is_step(x, cache):
            chosen = convolution.choose_step(mixed, self.conv_size, cache.conv)
            return LayerExplanation(
                chosen, explain(**tensors, **self.options, state=cache.state), norm
            )
        state = None if cache is None else cache.state
        rule = explain(
            **tensors, **self.options, cu_seqlens=cu_seqlens, initial_state=state,
            output_final_state=cache is not None,
        )  # fmt: skip
        return LayerExplanation(convolution.choose(mixed, self.conv_size), rule, norm)

    def _is_step(self, x: Tensor, cache: Cache | None) -> bool:
        return cache is not None and x.shape[1] <= _STEP and not torch.is_grad_enabled()

    def _split(
        self,
        projected: Tensor,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
        cp: ContextParallel | None,
        step: bool,
    ) -> tuple[dict[str, Any], Tensor]:
        """The op's tensors, and the norm's gate [B, T, HV, V]."""
        mixed, z, b, a = torch.split(projected, self.widths, -1)
        if cache is not None and step:
            mixed = convolve_step(mixed, self.conv1d.weight[:, 0], cache.conv)
        else:
            mixed = self._convolve(mixed, cache, cu_seqlens, cp)
        return self._arguments(mixed, b, a), z.view(*z.shape[:2], self.HV, self.V)

    def _arguments(self, mixed: Tensor, b: Tensor, a: Tensor) -> dict[str, Any]:
        """The tensors and the backend of a call of the op."""
        q, k, v = torch.split(mixed, self.sizes, -1)
        tokens = mixed.shape[:2]
        return {
            "q": q.view(*tokens, self.H, self.K),
            "k": k.view(*tokens, self.H, self.K),
            "v": v.view(*tokens, self.HV, self.V),
            "g": a,
            "beta": b,
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "backend": self.backend,
        }

    def _convolve(
        self,
        x: Tensor,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
        cp: ContextParallel | None = None,
    ) -> Tensor:
        """silu(sum_j weight_j x_{t - j}) over [B, T, channels], within each sequence."""
        weight = self.conv1d.weight[:, 0]
        if cp is not None:
            x, places = conv_halo(x, self.conv_size, cp)
            if not x.shape[1]:  # a row, so that the weight has a gradient, of zeros
                x = F.pad(x, (0, 0, 0, 1))
            return short_convolution(x, weight).index_select(1, places)
        conv = None if cache is None else cache.conv
        return short_convolution(x, weight, cache=conv, cu_seqlens=cu_seqlens)

    def qwen_state_dict(self) -> dict[str, Tensor]:
        """The state dict under the names of Qwen3.5's layer in transformers: its projections are
        views of `in_proj`."""
        found = dict(self.state_dict())
        parts = torch.split(found.pop("in_proj.weight"), self.widths)
        split = {f"in_proj_{n}.weight": x for n, x in zip(_PROJECTIONS, parts, strict=True)}
        return split | found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also take the projections of Qwen3.5, and of Qwen3-Next: q, k, v, z and b, a of each q/k
        head side by side."""
        if f"{prefix}in_proj_qkvz.weight" in state_dict:
            group, width = self.HV // self.H, self.in_proj.in_features
            qkvz = state_dict.pop(f"{prefix}in_proj_qkvz.weight").view(self.H, -1, width)
            sizes = [self.K, self.K, group * self.V, group * self.V]
            parts = [part.reshape(-1, width) for part in qkvz.split(sizes, 1)]
            ba = state_dict.pop(f"{prefix}in_proj_ba.weight").view(self.H, 2, group, width)
            parts += [ba[:, i].reshape(-1, width) for i in range(2)]
            state_dict[f"{prefix}in_proj.weight"] = torch.cat(parts)
        names = [f"{prefix}in_proj_{n}.weight" for n in _PROJECTIONS]
        if all(name in state_dict for name in names):
            state_dict[f"{prefix}in_proj.weight"] = torch.cat([state_dict.pop(n) for n in names])
        super()._load_from_state_dict(state_dict, prefix, *args)
