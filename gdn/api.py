"""The public ops, `gated_delta_net` and `gated_delta_net_decode`, and `explain`, which says what
they would do."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn import dispatch, ops
from gdn.problem import STEP_TENSORS, Call, Step, describe, describe_step
from gdn.validation import validate, validate_step
from gdn.values import check_cu_seqlens, check_slots


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
        g: natural log of the decay [B, T, HV], <= 0 in practice, finite, any floating dtype; with
            use_gate_in_kernel the raw gate. It is summed over 64 tokens in float32: one below -1e3
            costs the tokens around it digits, one of -1e9 all of them.
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
        cu_seqlens_cpu: the same values on the CPU; spares backends that need lengths on the host a
            device sync.
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
        TypeError: what must be a tensor, or a backend's name, is something else.
        RuntimeError: on double backward, or where an input has a tangent.

    cu_seqlens' values are checked at once on the CPU, and by an asynchronous device assertion on a
    GPU, once for a tensor until it changes (made in inference mode: once). Under autocast q, k and
    v are cast to its dtype, as for scaled_dot_product_attention. torch.func's transforms and
    forward-mode derivatives are not supported. Under torch.compile the request in force when the
    call is traced is the one that holds; `use_backend` goes around the compiled call, inside it
    pass backend=.
    """
    q, k, v, scale = _make_common(q, k, v, g, beta, scale)
    if transpose_state_layout is not None:
        state_v_first = _under_former_name(transpose_state_layout, state_v_first)
    call = Call(  # by position: a third of the time that keywords take
        q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, cu_seqlens_cpu, chunk_indices,
        scale, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first,
    )  # fmt: skip
    return GDNOutput(*ops.run_forward(call, _request(backend), _needs_grad(call)))


def gated_delta_net_decode(
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
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A decode step of the same rule: T >= 1 new tokens of each of N sequences, whose states lie in
    a pool and are updated in place. Not differentiable.

    Args:
        q, k, v, g, beta, scale, the fused options, cu_seqlens, backend: as in `gated_delta_net`. q,
            k, v of a GPU call may be slices of one tensor; they are not copied.
        state: the pool [slots, HV, K, V] in float32 or bfloat16 (float64 with float64 inputs); the
            arithmetic is in float32. Slots may be padded: state.stride(0) may exceed HV K V.
        state_indices: [N], int32 or int64: the slot of each sequence, read and written. None stands
            for 0, 1, ..., N - 1, and the pool then has N slots. Or, for speculative decoding, [N, 1
            + T]: column c is the slot of the state after c tokens of the step. A step starts from
            column 0 and writes the others; with cu_seqlens there may be fewer columns than tokens,
            and states past the last column are not kept.
        null_index: a sequence whose slot this is (padding of a batch) is skipped: its o is zero,
            and no slot is touched.
        num_accepted_tokens: [N], with state_indices [N, 1 + T]: the column to start from, in place
            of 0: how many tokens of the last step, laid out alike, were accepted.
        state_v_first: the pool is [slots, HV, V, K].

    Returns:
        o [B, T, HV, V] in v's dtype. Slots that state_indices does not name keep their bits.

    Raises:
        ValueError, TypeError, BackendUnsupportedError, UnknownBackendError: as `gated_delta_net`.
        RuntimeError: an input requires grad while gradients are on.

    The values of state_indices and num_accepted_tokens are checked on the CPU; on a GPU a slot
    outside the pool counts as null_index, and naming one slot twice is a race.
    """
    _require_pool(state)
    q, k, v, scale = _make_common(q, k, v, g, beta, scale)
    step = Step(
        q, k, v, g, beta, state, state_indices, num_accepted_tokens, A_log, dt_bias, cu_seqlens,
        scale, null_index, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel,
        allow_neg_eigval, state_v_first,
    )  # fmt: skip
    if torch.is_grad_enabled():
        for name, x in zip(Step._fields, step[:STEP_TENSORS], strict=False):
            if getattr(x, "requires_grad", False):  # `check_types` sees to what is no tensor
                raise RuntimeError(
                    f"gdn.gated_delta_net_decode is not differentiable, and {name} requires grad; "
                    "call it under torch.no_grad(), or use gdn.gated_delta_net"
                )
    return ops.run_decode(step, _request(backend))


def explain(*args: Any, backend: str | None = None, **options: Any) -> dispatch.Explanation:
    """Why each backend would or would not run this call, and which would; arguments as
    `gated_delta_net`'s, or with state= as `gated_delta_net_decode`'s.

    Nothing is computed, and tensors on the meta device will do. Raises ValueError on malformed
    arguments.
    """
    request, source = dispatch.request_in_force(backend)
    if "state" in options:
        step = _make_step(*args, **options)
        validate_step(step)
        check_cu_seqlens(step)
        check_slots(step)
        return dispatch.explain(request, source, describe_step(step))
    call = _make_call(*args, **options)
    validate(call)
    check_cu_seqlens(call)
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
    """The Call that `gated_delta_net` makes of its arguments."""
    q, k, v, scale = _make_common(q, k, v, g, beta, scale)
    if transpose_state_layout is not None:
        state_v_first = _under_former_name(transpose_state_layout, state_v_first, stacklevel=4)
    return Call(q, k, v, g, beta, scale=scale, state_v_first=state_v_first, **options)


def _make_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor,
    scale: float | None = None,
    **options: Any,
) -> Step:
    """The Step that `gated_delta_net_decode` makes of its arguments."""
    _require_pool(state)
    q, k, v, scale = _make_common(q, k, v, g, beta, scale)
    return Step(q, k, v, g, beta, state, scale=scale, **options)


def _make_common(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v as autocast has them, and the scale."""
    for i, x in enumerate((q, k, v, g, beta)):
        if not isinstance(x, Tensor):
            raise ops.no_tensor(Call._fields[i], x)
    if scale is None:
        K = q.shape[-1] if q.dim() else 0
        scale = K**-0.5 if K else 1.0
    if ops.autocasts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    return q, k, v, scale


def _require_pool(state: Tensor) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"state must be a torch.Tensor, got {type(state).__name__}; pass the pool")


def _under_former_name(transposed: bool, state_v_first: bool, stacklevel: int = 3) -> bool:
    """state_v_first, given as transpose_state_layout."""
    if state_v_first:
        raise ValueError(
            "state_v_first must come without transpose_state_layout, got both; "
            "drop the latter, which is its former name"
        )
    if not torch.compiler.is_compiling():  # which cannot trace a warning
        warnings.warn(
            "transpose_state_layout is fla's former name of state_v_first; pass that instead",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
    return transposed


def _needs_grad(call: Call) -> bool:
    try:
        if torch.is_grad_enabled():
            for x in call.differentiable:
                if x is not None and x.requires_grad:
                    return True
    except AttributeError:
        ops.check_types(call)
        raise
    return False


def _request(backend: str | None) -> str:
    """The request in force: a constant to torch.compile, which holds the one it was traced
    under."""
    return dispatch.request_in_force(backend)[0]


# torch.compiler.assume_constant_result's mark; the decorator would import Dynamo, and so Triton
_request._dynamo_marked_constant = True  # type: ignore[attr-defined]
