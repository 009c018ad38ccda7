"""The public op: `gated_delta_net`, and `explain`, which says what it would do."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn import dispatch, ops
from gdn.problem import Call, describe
from gdn.validation import check_cu_seqlens, validate


class GDNOutput(NamedTuple):
    """o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in float32, or None if not
    asked for."""

    o: Tensor
    final_state: Tensor | None


def gated_delta_net(
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
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> GDNOutput:
    """The gated delta rule (arXiv 2412.06464, equation 10; stated in full in `gdn.definition`).

    Differentiable once in q, k, v, g, beta, initial_state, A_log and dt_bias. No argument is
    written to.

    Args:
        q, k: queries and keys [B, T, H, K]. q, k and v share one dtype: float16, bfloat16, float32
            or float64.
        v: values [B, T, HV, V]; HV is a multiple of H, value head h reads q/k head h // (HV / H).
        g: natural log of the decay [B, T, HV], <= 0 in practice, any floating dtype; with
            use_gate_in_kernel the raw gate.
        beta: write strength [B, T, HV], any floating dtype; with use_beta_sigmoid_in_kernel its
            logit.
        scale: factor on q; None stands for K^-0.5.
        initial_state: [N, HV, K, V], any floating dtype, N = B or the number of packed sequences;
            None is zero.
        output_final_state: also return the state after the last token.
        use_qk_l2norm_in_kernel: use x / sqrt(sum x^2 + 1e-6) for q and k.
        use_gate_in_kernel: use -exp(A_log) softplus(g + dt_bias) for g. A_log, dt_bias (optional):
            [HV].
        use_beta_sigmoid_in_kernel: use sigmoid(beta) for beta; with allow_neg_eigval 2
            sigmoid(beta).
        state_v_first: states are [N, HV, V, K], in and out.
        cu_seqlens: cumulative lengths [N + 1], int32 or int64, of N sequences packed along T, with
            B = 1.
        cu_seqlens_cpu: the same on the CPU; spares backends that need lengths on the host a device
            sync.
        chunk_indices: fla's precomputed (sequence, chunk) table [chunks, 2]; read by the fla
            backend alone.
        transpose_state_layout: fla's former name of state_v_first (DeprecationWarning).
        backend: a backend's name (strict), a list "tilelang,triton" (first that can), or "auto";
            None leaves it to use_backend, set_default_backend, GDN_BACKEND, auto, in this order.

    Returns:
        GDNOutput(o, final_state): o in v's dtype, accumulated in float32; final_state in float32.
        With float64 inputs both are computed and returned in float64.

    Raises:
        ValueError: an argument is malformed: its name, the requirement, what it got and a remedy.
        BackendUnsupportedError: no backend of the request can run this call; every reason is named.
        UnknownBackendError: the request names no registered backend (a ValueError).
        RuntimeError: on double backward.

    cu_seqlens' values are checked at once on the CPU, and by an asynchronous device assertion on a
    GPU, once for a tensor until it changes. Under autocast q, k and v are cast to its dtype, as for
    scaled_dot_product_attention. torch.func.vmap is not supported. Under torch.compile the request
    in force when the call is traced is the one that holds.
    """
    call = _make_call(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_indices=chunk_indices,
        transpose_state_layout=transpose_state_layout,
    )
    return GDNOutput(*ops.run_forward(call, _request(backend), _needs_grad(call)))


def explain(*args: Any, backend: str | None = None, **options: Any) -> dispatch.Explanation:
    """Why each backend would or would not run this call, and which would; arguments as
    `gated_delta_net`'s.

    Nothing is computed, and tensors on the meta device will do. Raises ValueError on malformed
    arguments.
    """
    call = _make_call(*args, **options)
    validate(call)
    check_cu_seqlens(call)
    request, source = dispatch.request_in_force(backend)
    return dispatch.explain(request, source, describe(call, _needs_grad(call)))


def _make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    transpose_state_layout: bool | None = None,
    state_v_first: bool = False,
    **options: Any,
) -> Call:
    """The Call behind the public arguments: defaults filled in, fla's former names and autocast
    applied."""
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(x).__name__}; see torch.as_tensor"
            )
    if transpose_state_layout is not None:
        if state_v_first:
            raise ValueError(
                "state_v_first must come without transpose_state_layout, got both; "
                "drop the latter, which is its former name"
            )
        warnings.warn(
            "transpose_state_layout is fla's former name of state_v_first; pass that instead",
            DeprecationWarning,
            stacklevel=3,
        )
        state_v_first = transpose_state_layout
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast to ask for
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    return Call(q, k, v, g, beta, scale=scale, state_v_first=state_v_first, **options)


def _needs_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in call.differentiable
    )


def _request(backend: str | None) -> str:
    """The request in force: a constant to torch.compile, which holds the one it was traced
    under."""
    return dispatch.request_in_force(backend)[0]


# torch.compiler.assume_constant_result's mark; the decorator would import Dynamo, and so Triton
_request._dynamo_marked_constant = True  # type: ignore[attr-defined]
