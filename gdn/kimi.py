"""Kimi Delta Attention under flash-linear-attention's names: the gated delta rule with a decay for
each channel of K."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gdn.api import GDNOutput, gated_delta_net
from gdn.context_parallel import ContextParallel
from gdn.serving import gated_delta_net_decode


def kimi_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool | None = None,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    cp: ContextParallel | None = None,
    backend: str | None = None,
) -> GDNOutput:
    """`gdn.gated_delta_net` with a decay per channel, under the names of fla's `chunk_kda`
    (arXiv 2510.26692; stated in full in `gdn.definition`).

    Args:
        g: natural log of the decay [B, T, HV, K], any floating dtype; with use_gate_in_kernel the
            raw gate. It must have the channels.
        A_log, dt_bias: [HV], and [HV, K] or flat [HV K]; only with use_gate_in_kernel. A_log may be
            None with a lower_bound.
        lower_bound: `gate_lower_bound` of `gdn.gated_delta_net`: the fused gate is lower_bound
            sigmoid(exp(A_log) (g + dt_bias)). Ignored without use_gate_in_kernel, as in fla.
        safe_gate: fla's choice of a faster kernel for gates that are at least -5. The result does
            not depend on it, and it is ignored, except that True with use_gate_in_kernel needs a
            lower_bound, as in fla.
        All other arguments: as in `gdn.gated_delta_net`, dtypes and units too.

    Returns:
        GDNOutput(o, final_state): o [B, T, HV, V] in v's dtype, accumulated in float32; final_state
        [N, HV, K, V] in float32, or None.

    Raises:
        ValueError: g has no channels, safe_gate is True for a fused gate without lower_bound, or
            another argument is malformed.
        BackendUnsupportedError, UnknownBackendError, TypeError, RuntimeError: as
            `gdn.gated_delta_net`.
    """
    _require_channels(g)
    _require_bound(lower_bound)
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ValueError(
            "lower_bound must be given with safe_gate=True and use_gate_in_kernel=True, got None; "
            "models use -5, or leave safe_gate out"
        )
    return gated_delta_net(
        q, k, v, g, beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        gate_lower_bound=lower_bound if use_gate_in_kernel else None,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        transpose_state_layout=transpose_state_layout,
        cp=cp,
        backend=backend,
    )  # fmt: skip


def kimi_delta_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor,
    state_indices: Tensor | None = None,
    null_index: int = -1,
    num_accepted_tokens: Tensor | None = None,
    out: Tensor | None = None,
    output_states: Tensor | None = None,
    output_indices: Tensor | None = None,
    leading_column: bool = True,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`gdn.gated_delta_net_decode` with a decay per channel: one step of T >= 1 new tokens of each
    of N sequences, on a pool of states that is updated in place. Not differentiable.

    Args:
        g, A_log, dt_bias, lower_bound: as in `gdn.kimi_delta_attention`.
        All other arguments: as in `gdn.gated_delta_net_decode`, dtypes and units too.

    Returns:
        o [B, T, HV, V] in v's dtype, or `out`. Slots that are not named do not change. With
        output_states, new states are there, and `state` does not change.

    Raises:
        ValueError: g has no channels, or another argument is malformed.
        BackendUnsupportedError, UnknownBackendError, TypeError, RuntimeError: as
            `gdn.gated_delta_net_decode`.
    """
    _require_channels(g)
    return gated_delta_net_decode(
        q, k, v, g, beta,
        state=state,
        state_indices=state_indices,
        null_index=null_index,
        num_accepted_tokens=num_accepted_tokens,
        out=out,
        output_states=output_states,
        output_indices=output_indices,
        leading_column=leading_column,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        gate_lower_bound=lower_bound if use_gate_in_kernel else None,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )  # fmt: skip


def _require_bound(lower_bound: object) -> None:
    """`gdn.gated_delta_net` names its own argument."""
    if lower_bound is None or (
        isinstance(lower_bound, float | int) and -math.inf < lower_bound < 0
    ):
        return
    raise ValueError(
        f"lower_bound must be a finite number below 0, got {lower_bound!r}; models use -5"
    )


def _require_channels(g: object) -> None:
    if isinstance(g, torch.Tensor) and g.dim() == 4:
        return
    got = tuple(g.shape) if isinstance(g, torch.Tensor) else type(g).__name__
    raise ValueError(
        f"g must be [B, T, HV, K], a decay per channel, got {got}; "
        "gdn.gated_delta_net also takes a decay per head, and None"
    )
