"""The public functions: the op `gated_delta_net`; `explain`, which shows the choice of a backend;
`warmup`, which compiles kernels before the first call. `gdn.serving` has the ops on pools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Unpack

from torch import Tensor

from gdn import calls, dispatch, explanation, ops
from gdn.calls import Options
from gdn.context_parallel import ContextParallel
from gdn.distributed import heads
from gdn.invariance import is_batch_invariant
from gdn.problem import Call, describe, describe_pool_call
from gdn.serving import gated_delta_net_decode, gated_delta_net_prefill
from gdn.validation import (
    check_bounds,
    check_cu_seqlens,
    check_memory,
    check_slots,
    validate,
    validate_pool_call,
)


class GDNOutput(NamedTuple):
    """o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in float32; None unless
    output_final_state."""

    o: Tensor
    final_state: Tensor | None


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    gate_lower_bound: float | None = None,
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
    cp: ContextParallel | None = None,
    backend: str | None = None,
) -> GDNOutput:
    """The gated delta rule (arXiv 2412.06464, equation 10; `gdn.definition` states it in full),
    with a decay per value head, or per channel (Kimi Delta Attention, arXiv 2510.26692).

    Differentiable once in q, k, v, g, beta, initial_state, A_log and dt_bias. No argument is
    written to.

    Args:
        q, k: queries and keys [B, T, H, K], float16, bfloat16, float32 or float64; cast to v's
            dtype if theirs is another.
        v: values [B, T, HV, V]; HV is a multiple of H, value head h reads q/k head h // (HV / H).
        g: natural log of the decay [B, T, HV], or [B, T, HV, K] for a decay per channel of K, or
            None for no decay; <= 0 in practice, any floating dtype; with use_gate_in_kernel the raw
            gate. -inf resets the state: earlier tokens have no effect.
            A gate below -104, whose exponential is zero in float32, has zero gradient. The fla
            backend differs: there -inf gives NaN, and gates such as -1e9 cost precision.
        beta: write strength [B, T, HV], any floating dtype; with use_beta_sigmoid_in_kernel its
            logit.
        scale: factor on q; None means K^-0.5.
        gate_lower_bound: L < 0; the fused gate is then L sigmoid(exp(A_log) (g + dt_bias)), and
            A_log may be None for 0.
        initial_state: [N, HV, K, V], any floating dtype, N = B or the number of packed sequences;
            None is zero.
        output_final_state: also return the state after the last token.
        use_qk_l2norm_in_kernel: use x / sqrt(sum x^2 + 1e-6) for q and k.
        use_gate_in_kernel: use -exp(A_log) softplus(g + dt_bias) for g. A_log [HV]; dt_bias
            (optional) [HV], or with a decay per channel [HV, K] or flat [HV K].
        use_beta_sigmoid_in_kernel: use sigmoid(beta) for beta; with allow_neg_eigval 2
            sigmoid(beta).
        state_v_first: states are [N, HV, V, K], in and out.
        cu_seqlens: cumulative lengths [N + 1], int32 or int64, of N sequences packed along T, with
            B = 1. They may end before T. The tokens after that are padding and may hold anything;
            their o and gradients are zero.
        cu_seqlens_cpu: the same values on the CPU; backends that need lengths on the host then
            avoid a device sync.
        chunk_indices: fla's precomputed (sequence, chunk) table [chunks, 2]; only the fla backend
            reads it.
        transpose_state_layout: fla's former name of state_v_first (DeprecationWarning).
        cp: the sequences lie on several ranks, and q, k, v, g, beta hold this rank's tokens
            [1, T_local, ...] (docs/distributed.md). States are global: [N, ...] for the sequences
            of all ranks, final_state the same on every rank. initial_state: only rows of sequences
            that begin on this rank are read. All ranks also run backward.
        backend: a name (no other backend is tried), a list "tilelang,triton" (the first that can
            run the call), or "auto". With None the first of these that is set decides: use_backend,
            set_default_backend, GDN_BACKEND, else "auto".

    Returns:
        GDNOutput(o, final_state): o in v's dtype, accumulated in float32; final_state in float32.
        With float64 inputs both are computed and returned in float64.

    Raises:
        ValueError: an argument is malformed. The message gives the argument, the requirement, the
            value and a remedy.
        BackendUnsupportedError: no requested backend can run this call. The message gives every
            reason.
        UnknownBackendError: a requested name is not registered (a ValueError).
        TypeError: a tensor argument is not a tensor, or backend is not a str.
        RuntimeError: on double backward, or if an input has a forward-mode tangent.

    The values of cu_seqlens are checked at every call on the CPU. On a GPU an asynchronous device
    assertion checks each tensor once, and again after it changes (a tensor made in inference mode:
    only once). Under autocast q, k and v are cast to its dtype, as for
    scaled_dot_product_attention. torch.func's transforms and forward-mode derivatives are not
    supported. torch.compile fixes the request when it traces the call: put `use_backend` around the
    compiled function, or pass backend= inside it. Tensors on the meta device and fake tensors give
    results of the right shapes and dtypes, and no backend runs; a backend that needs a GPU refuses
    meta tensors ("auto" then chooses torch).
    """
    q, k, v, scale = calls.prepare(q, k, v, beta, scale)
    g, dt_bias = calls.prepare_gate(v, g, dt_bias, use_gate_in_kernel)
    if transpose_state_layout is not None:
        state_v_first = calls.from_former_name(transpose_state_layout, state_v_first)
    call = Call(  # positional: three times faster than by keyword
        q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, cu_seqlens_cpu, chunk_indices,
        scale, gate_lower_bound, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, is_batch_invariant(),
    )  # fmt: skip
    if cp is not None or heads.is_sharded(q):
        return GDNOutput(*heads.run(call, cp, dispatch.request(backend)))
    return GDNOutput(*ops.run_forward(call, dispatch.request(backend), calls.needs_grad(call)))


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    prefill: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> explanation.Explanation:
    """Show which backend would run this call, and why the others would not. Computes nothing.

    Args:
        q, k, v, g, beta, prefill, **options, backend: as in `gated_delta_net`; or with state= as in
            `gated_delta_net_decode`, or with prefill=True as in
            `gated_delta_net_prefill`. Tensors on the meta device are enough.

    Returns:
        The request and where it was set, the chosen backend, and a verdict for every backend.
        `print` shows all of it.

    Raises:
        ValueError, TypeError: an argument is malformed, as in the call itself.
    """
    request, source = dispatch.request_in_force(backend)
    cp = options.pop("cp", None)
    call = calls.make(q, k, v, g, beta, dict(options), prefill)
    if not isinstance(call, Call):
        validate_pool_call(call)
        check_bounds(call.call)
        check_slots(call)
        check_memory(call)
        return explanation.explain(request, source, describe_pool_call(call), call)
    validate(call)
    check_cu_seqlens(call)
    problem = replace(describe(call, calls.needs_grad(call)), context_parallel=cp is not None)
    return explanation.explain(request, source, problem, call)


def warmup(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    prefill: bool = False,
    backward: bool | None = None,
    sm: int | None = None,
    backend: str | None = None,
    **options: Unpack[Options],
) -> str:
    """Compile the kernels that a call like this one needs, in parallel. Computes nothing.

    Args:
        q, k, v, g, beta, prefill, **options, backend: as in `explain`.
        backward: also compile the kernels of the gradients. None: if an input requires grad.
        sm: compute capability times ten of the GPU to compile for (90: Hopper). The tensors may
            then be on the meta device, and no GPU is needed if the backend can compile without one.

    Returns:
        The name of the backend that would run the call. A backend that compiles at its first call
        does nothing here.

    Raises:
        ValueError, BackendUnsupportedError, UnknownBackendError: as the call would.
        gdn.backend.MissingKernelError: the call can run, but a decode step of another size lacks
            kernels, and they cannot be compiled here. The message has the command that builds them.
    """
    cp = options.pop("cp", None)
    call = calls.make(q, k, v, g, beta, dict(options), prefill)
    if not isinstance(call, Call):
        validate_pool_call(call)
        problem = describe_pool_call(call)
    else:
        validate(call)
        backward = calls.needs_grad(call) if backward is None else backward
        problem = replace(describe(call, backward), context_parallel=cp is not None)
    if sm is not None:
        problem = replace(problem, device="cuda", sm=sm)
    return dispatch.precompile(dispatch.request_in_force(backend)[0], call, problem)[0]


_function: Any
for _function in (explain, warmup):  # editors read the annotations, help() reads __signature__
    _function.__signature__ = calls.full_signature(
        _function, gated_delta_net, gated_delta_net_decode, gated_delta_net_prefill
    )
