"""The public functions: `gated_delta_net` and `gated_delta_net_decode`; `explain`, which says what
they would do; `warmup`, which compiles what they need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from gdn import calls, dispatch, ops
from gdn.calls import Options
from gdn.problem import Call, Step, describe, describe_step
from gdn.validation import (
    check_cu_seqlens,
    check_slots,
    refuse_gradients,
    validate,
    validate_step,
)


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
    q, k, v, scale = calls.prepare(q, k, v, g, beta, scale)
    if transpose_state_layout is not None:
        state_v_first = calls.from_former_name(transpose_state_layout, state_v_first)
    call = Call(  # by position: a third of the time that keywords take
        q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, cu_seqlens_cpu, chunk_indices,
        scale, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first,
    )  # fmt: skip
    return GDNOutput(*ops.run_forward(call, _request(backend), calls.needs_grad(call)))


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
    calls.require_pool(state)
    q, k, v, scale = calls.prepare(q, k, v, g, beta, scale)
    call = Call(
        q, k, v, g, beta, None, A_log, dt_bias, cu_seqlens, None, None,
        scale, False, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first,
    )  # fmt: skip
    step = Step(call, state, state_indices, num_accepted_tokens, null_index)
    if torch.is_grad_enabled():
        refuse_gradients(step)
    return ops.run_decode(step, _request(backend))


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    backend: str | None = None,
    **options: Unpack[Options],
) -> dispatch.Explanation:
    """Why each backend would or would not run this call, and which would.

    Args:
        q, k, v, g, beta, **options, backend: as in `gated_delta_net`, or with state= as in
            `gated_delta_net_decode`. Tensors on the meta device will do.

    Returns:
        Request and source, choice, and a verdict of every backend; `print` shows all of it. Nothing
        is computed.

    Raises:
        ValueError, TypeError: the arguments are malformed, as in the call itself.
    """
    request, source = dispatch.request_in_force(backend)
    call = calls.make(q, k, v, g, beta, dict(options))
    if isinstance(call, Step):
        validate_step(call)
        check_cu_seqlens(call.call)
        check_slots(call)
        return dispatch.explain(request, source, describe_step(call))
    validate(call)
    check_cu_seqlens(call)
    return dispatch.explain(request, source, describe(call, calls.needs_grad(call)))


def warmup(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    backward: bool | None = None,
    sm: int | None = None,
    backend: str | None = None,
    **options: Unpack[Options],
) -> str:
    """Compile what a call like this one needs, kernels side by side; compute nothing.

    Args:
        q, k, v, g, beta, **options, backend: as in `gated_delta_net`, or with state= as in
            `gated_delta_net_decode`.
        backward: also what its gradients need. None: if an input requires grad.
        sm: compute capability times ten of the GPU to compile for (90: Hopper). The tensors may
            then be on the meta device, and there need be no GPU, if the backend can do without.

    Returns:
        The name of the backend that would run the call. One that compiles nothing ahead of its
        first call does nothing here.

    Raises:
        ValueError, BackendUnsupportedError, UnknownBackendError: as the call would.
    """
    call = calls.make(q, k, v, g, beta, dict(options))
    if isinstance(call, Step):
        validate_step(call)
        problem = describe_step(call)
    else:
        validate(call)
        backward = calls.needs_grad(call) if backward is None else backward
        problem = describe(call, backward)
    if sm is not None:
        problem = replace(problem, device="cuda", sm=sm)
    return dispatch.precompile(dispatch.request_in_force(backend)[0], call, problem)[0]


_function: Any
for _function in (explain, warmup):  # what editors read off the annotations, help() reads off this
    _function.__signature__ = calls.full_signature(
        _function, gated_delta_net, gated_delta_net_decode
    )


def _request(backend: str | None) -> str:
    """The request in force: a constant to torch.compile, which holds the one it was traced
    under."""
    return dispatch.request_in_force(backend)[0]


# torch.compiler.assume_constant_result's mark; the decorator would import Dynamo, and so Triton
_request._dynamo_marked_constant = True  # type: ignore[attr-defined]
