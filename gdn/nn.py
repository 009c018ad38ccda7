"""The Gated DeltaNet layer of Qwen3-Next and Qwen3.5 (arXiv 2412.06464, figure 1) as a torch
module, and its cache."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn.api import gated_delta_net
from gdn.context_parallel import ContextParallel
from gdn.definition import initialize_gates
from gdn.distributed import conv_halo
from gdn.serving import gated_delta_net_decode

_STEP = 8
"""Tokens up to which a call with a cache is a decode step rather than a sequence."""


class Cache:
    """What a layer remembers of B sequences between calls, updated in place.

    conv [B, channels, conv_size - 1]: the last inputs of the short convolution. state [B, HV, K, V]
    in float32 (float64 for a layer in float64).

    Not a dataclass: FSDP's mixed precision replaces the tensors in one by copies in its
    param_dtype, so that updates would be lost.
    """

    def __init__(self, conv: Tensor, state: Tensor) -> None:
        self.conv, self.state = conv, state


class GatedRMSNorm(nn.Module):
    """y = weight x / sqrt(mean x^2 + eps) * silu(gate), over the last dimension; the norm and the
    gate in float32."""

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return ((self.weight * wide.to(x.dtype)) * F.silu(gate.float())).to(x.dtype)


class GatedDeltaNet(nn.Module):
    """Projections, a causal depthwise convolution with SiLU over q, k and v, the gated delta rule
    with L2 norm, gate and sigmoid fused, a gated RMS norm, and a projection back.

    Parameters have the names of Qwen3.5's layer in transformers, and a state dict of that layer or
    of Qwen3-Next's (whose projections are interleaved by head) loads as it is. The convolution runs
    on causal-conv1d where that is installed and the input is on a GPU, else on torch.

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
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        linear: Any = functools.partial(nn.Linear, bias=False, **own)
        self.in_proj_qkv = linear(hidden_size, channels)
        self.in_proj_z = linear(hidden_size, values)
        self.in_proj_b = linear(hidden_size, self.HV)
        self.in_proj_a = linear(hidden_size, self.HV)
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
            f"hidden_size={self.in_proj_qkv.in_features}, num_k_heads={self.H}, "
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
        conv = torch.zeros(batch, sum(self.sizes), self.conv_size - 1, device=device, dtype=dtype)
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
        if cache is not None and _in_backward():
            raise RuntimeError(
                "cache must come outside of backward passes, got a forward within one, as "
                "activation checkpointing makes it, from the state that the first forward left; "
                "leave out the cache or the checkpointing"
            )
        B, T, _ = x.shape
        mixed = self._convolve(self.in_proj_qkv(x), cache, cu_seqlens, cp)
        q, k, v = torch.split(mixed, self.sizes, -1)
        tensors: dict[str, Any] = {
            "q": q.reshape(B, T, self.H, self.K),
            "k": k.reshape(B, T, self.H, self.K),
            "v": v.reshape(B, T, self.HV, self.V),
            "g": self.in_proj_a(x),
            "beta": self.in_proj_b(x),
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "backend": self.backend,
        }
        if cache is not None and T <= _STEP and not torch.is_grad_enabled():
            o = gated_delta_net_decode(**tensors, **self.options, state=cache.state)
        else:
            o, state = gated_delta_net(
                **tensors, **self.options, cu_seqlens=cu_seqlens, cp=cp,
                initial_state=None if cache is None else cache.state.clone(),
                output_final_state=cache is not None,
            )  # fmt: skip
            if cache is not None and state is not None:
                cache.state.copy_(state.detach())
        z = self.in_proj_z(x).reshape(B, T, self.HV, self.V)
        out: Tensor = self.out_proj(self.norm(o, z).flatten(2))
        return out

    def _convolve(
        self,
        x: Tensor,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
        cp: ContextParallel | None = None,
    ) -> Tensor:
        """silu(sum_j weight_j x_{t - j}) over [B, T, channels], within each sequence."""
        if cp is not None:
            x, places = conv_halo(x, self.conv_size, cp)
            if not x.shape[1]:  # a row, so that the weight has a gradient, of zeros
                x = F.pad(x, (0, 0, 0, 1))
            return self._causal_convolution(x.mT).mT.index_select(1, places)
        if not x.shape[1]:
            return x
        x, before = x.mT, self.conv_size - 1
        if cu_seqlens is not None:
            return convolve_packed(self._causal_convolution, x, cu_seqlens, self.conv_size).mT
        if cache is None:
            return self._causal_convolution(x).mT
        x = torch.cat([cache.conv.to(x.dtype), x], -1)
        cache.conv.copy_(x[..., x.shape[-1] - before :].detach())
        return F.silu(F.conv1d(x, self.conv1d.weight, groups=x.shape[1])).mT

    def _causal_convolution(self, x: Tensor) -> Tensor:
        """silu(sum_j weight_j x_{t - j}) over [B, channels, T], zeros in front."""
        if fast := _causal_conv1d(x, self.conv_size):
            return fast(x, self.conv1d.weight[:, 0], activation="silu")
        x = F.pad(x, (self.conv_size - 1, 0))
        return F.silu(F.conv1d(x, self.conv1d.weight, groups=x.shape[1]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also take Qwen3-Next's projections, q, k, v, z and b, a of each q/k head side by side."""
        if f"{prefix}in_proj_qkvz.weight" in state_dict:
            group, width = self.HV // self.H, self.in_proj_qkv.in_features
            qkvz = state_dict.pop(f"{prefix}in_proj_qkvz.weight").view(self.H, -1, width)
            sizes = [self.K, self.K, group * self.V, group * self.V]
            *qkv, z = (part.reshape(-1, width) for part in qkvz.split(sizes, 1))
            ba = state_dict.pop(f"{prefix}in_proj_ba.weight").view(self.H, 2, group, width)
            parts = {"qkv": torch.cat(qkv), "z": z}
            parts |= {n: ba[:, i].reshape(-1, width) for i, n in enumerate("ba")}
            state_dict |= {f"{prefix}in_proj_{n}.weight": x for n, x in parts.items()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _in_backward() -> bool:
    """Whether a backward pass runs this; compiled code, which cannot know, counts as outside."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _causal_conv1d(x: Tensor, taps: int) -> Callable[..., Tensor] | None:
    """causal-conv1d's kernel, where it is installed and takes x [B, channels, T]."""
    takes = 2 <= taps <= 4 and x.shape[1] % 8 == 0 and x.dtype != torch.float64
    if not (takes and x.is_cuda) or importlib.util.find_spec("causal_conv1d") is None:
        return None
    from causal_conv1d import causal_conv1d_fn

    return cast(Callable[..., Tensor], causal_conv1d_fn)


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
