"""gdn as the deterministic mode of Megatron-core's Gated DeltaNet layer.

Megatron-core calls fla, so `import gdn.integrations.fla` alone gives its layer gdn. With
deterministic_mode it calls a PyTorch loop instead, and refuses packed sequences; the layer here
runs gdn, which is deterministic, packed sequences included.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from gdn.api import gated_delta_net
from gdn.convolution import convolve_packed


def _import_layer() -> Any:
    """Megatron-core's class. RuntimeError where it is missing."""
    if importlib.util.find_spec("megatron") is not None:
        try:
            return importlib.import_module("megatron.core.ssm.gated_delta_net").GatedDeltaNet
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("megatron"):
                raise
    raise RuntimeError(
        "megatron-core 0.16 or newer must be installed, with fla, got none with "
        "megatron.core.ssm.gated_delta_net; pip install megatron-core"
    )


_Layer = _import_layer()
_FORWARD = inspect.signature(_Layer.forward)


def heads_of(x: Tensor, size: int) -> Tensor:
    """[B, T, heads * size] as [B, T, heads, size]."""
    return x.view(*x.shape[:2], -1, size)


class GatedDeltaNet(_Layer):  # type: ignore[misc, valid-type]
    """Megatron-core's layer for a `ModuleSpec`, with the same arguments, submodules and parameters.

    With config.deterministic_mode its forward runs gdn: packed sequences ("thd") too, tensor and
    sequence parallel too. Without deterministic_mode, and with context parallelism, forward is
    Megatron's own.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See Megatron-core's class: hidden states [T, B, hidden] to the same, and the bias of
        out_proj."""
        given = _FORWARD.bind(self, *args, **kwargs).arguments
        contexts = (given.get("inference_context"), given.get("inference_params"))
        own = self.config.deterministic_mode and contexts == (None, None)
        if not own or getattr(self, "cp_size", 1) > 1:
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        packed = given.get("packed_seq_params")
        bounds = None
        if packed is not None and packed.qkv_format == "thd":
            padded = packed.cu_seqlens_q_padded
            bounds = packed.cu_seqlens_q if padded is None else padded
        projected: Tensor
        projected, _ = self.in_proj(given["hidden_states"])
        qk, v, heads = (x // self.tp_size for x in (self.qk_dim, self.v_dim, self.num_value_heads))
        sections = [2 * qk + v, v, heads, heads]
        qkv, gate, beta, alpha = torch.split(projected.transpose(0, 1), sections, -1)
        query, key, value = torch.split(self._convolve(qkv.mT, bounds).mT, [qk, qk, v], -1)
        o, _ = gated_delta_net(
            heads_of(query, self.key_head_dim),
            heads_of(key, self.key_head_dim),
            heads_of(value, self.value_head_dim),
            alpha,
            beta,
            use_qk_l2norm_in_kernel=self.use_qk_l2norm,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            cu_seqlens=bounds,
        )
        normed = self._apply_gated_norm(o, heads_of(gate, self.value_head_dim).contiguous())
        normed = normed.reshape(*qkv.shape[:2], v)
        return self.out_proj(normed.transpose(0, 1).contiguous())  # type: ignore[no-any-return]

    def _convolve(self, x: Tensor, bounds: Tensor | None) -> Tensor:
        """The short convolution of [B, channels, T] and its activation, within each packed
        sequence."""

        def convolution(x: Tensor) -> Tensor:
            y: Tensor = self.act_fn(self.conv1d(x)[..., : x.shape[-1]])
            return y

        if bounds is None:
            return convolution(x)
        return convolve_packed(convolution, x, bounds, self.conv_kernel_dim)
