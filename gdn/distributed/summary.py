"""What the tokens of a part do to a state, and to the gradient of a state: an affine map each.

A part takes the state S before its first token to M S + N after its last one (`summarize`). It
takes the gradient dS of the state after it to M^T dS + N' before it (`summarize_gradient`). Both
run the op itself, on any backend: N is the final state from zero, and M the final state from the
unit matrix where v is zero. N' is the gradient of the initial state that the outputs alone cause.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn import calls, dispatch
from gdn.invariance import is_batch_invariant
from gdn.problem import Call
from gdn.validation import check_types, refuse_transforms

from . import choice


def summarize(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    gate_lower_bound: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """(N | M) of each sequence: its tokens take a state S [HV, K, V] to M S + N.

    The map is that of `gdn.definition`: M = prod_t (I - beta_t k_t k_t^T) exp(g_t), last token
    first (arXiv 2412.06464, equation 10). Not differentiable.

    Args:
        k, v, g, beta and all options: as in `gdn.gated_delta_net`.

    Returns:
        [N, HV, K, V + K], float32, float64 for float64 inputs: N in the first V columns, M in the
        last K. N is B or the number of packed sequences. No tokens give (0 | I).

    Raises:
        ValueError, TypeError, BackendUnsupportedError, UnknownBackendError: as
            `gdn.gated_delta_net`.
    """
    k, _, v, _ = calls.prepare(k, k, v, beta, None)
    g, dt_bias = calls.prepare_gate(v, g, dt_bias, use_gate_in_kernel)
    call = Call(
        k, k, v, g, beta, None, A_log, dt_bias, cu_seqlens,
        gate_lower_bound=gate_lower_bound,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        batch_invariant=is_batch_invariant(),
    )  # fmt: skip
    check_types(call)
    refuse_transforms()
    request = choice.pin(dispatch.request_in_force(backend)[0], call, False)
    return summary(call, request)


def summarize_gradient(
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    beta: Tensor,
    grad_o: Tensor,
    *,
    grad_final_state: Tensor | None = None,
    scale: float | None = None,
    gate_lower_bound: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """N' of each sequence: its tokens take the gradient dS of the state after them to M^T dS + N',
    the gradient of the state before them; M is `summarize`'s. It does not depend on v or on states.

    Args:
        q, k, g, beta and all options: as in `gdn.gated_delta_net`.
        grad_o: gradient of the outputs [B, T, HV, V].
        grad_final_state: gradient of the state after the last token [N, HV, K, V]; the result is
            then M^T grad_final_state + N'. None is zero.

    Returns:
        [N, HV, K, V], float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError, BackendUnsupportedError, UnknownBackendError: as
            `gdn.gated_delta_net`.
    """
    q, k, grad_o, scale = calls.prepare(q, k, grad_o, beta, scale)
    g, dt_bias = calls.prepare_gate(grad_o, g, dt_bias, use_gate_in_kernel)
    call = Call(
        q, k, grad_o, g, beta, None, A_log, dt_bias, cu_seqlens,
        scale=scale,
        gate_lower_bound=gate_lower_bound,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        batch_invariant=is_batch_invariant(),
    )  # fmt: skip
    check_types(call)
    refuse_transforms()
    if grad_final_state is not None and tuple(grad_final_state.shape) != call.state_shape:
        raise ValueError(
            f"grad_final_state must be [N, HV, K, V] = {call.state_shape}, "
            f"got {tuple(grad_final_state.shape)}"
        )
    request = choice.pin(dispatch.request_in_force(backend)[0], call, True)
    return initial_gradient(call, request, grad_o, grad_final_state)


def compose(earlier: Tensor, later: Tensor) -> Tensor:
    """The summary of two neighbouring parts from theirs: (N_l + M_l N_e | M_l M_e).

    Args:
        earlier, later: [..., K, V + K], as `summarize` returns them; the later part follows the
            earlier one.

    Returns:
        [..., K, V + K] in their dtype, computed in float64. Composing is associative.

    Raises:
        ValueError: the shapes differ.
    """
    if earlier.shape != later.shape or earlier.dim() < 2:
        raise ValueError(
            f"later must be [..., K, V + K] = {tuple(earlier.shape)}, got {tuple(later.shape)}; "
            "both come from summarize"
        )
    K = later.shape[-2]
    N, M = later[..., :-K], later[..., -K:]
    composed = M.double() @ earlier.double()
    composed[..., :-K] += N.double()
    return composed.to(later.dtype)


def summary(call: Call, request: str) -> Tensor:
    """(N | M) of each sequence [N, HV, K, V + K]; `call` has no initial state."""
    return torch.cat([final_state(call, request), transfer(call, request)], -1)


@torch.no_grad()
def final_state(call: Call, request: str) -> Tensor:
    """The state after the last tokens [N, HV, K, V]."""
    call = call._replace(output_final_state=True, state_v_first=False)
    return torch.ops.gdn.forward(*call, request, False)[1]  # type: ignore[no-any-return]


@torch.no_grad()
def transfer(call: Call, request: str) -> Tensor:
    """M of each sequence [N, HV, K, K]: what becomes of the columns of the unit matrix."""
    HV, K = call.v.shape[2], call.q.shape[3]
    unit = torch.eye(K, dtype=call.state_dtype, device=call.q.device)
    unit = unit.expand(call.sequences, HV, K, K).contiguous()
    v = call.v.new_zeros((*call.v.shape[:3], K))
    return final_state(call._replace(v=v, initial_state=unit), request)


@torch.no_grad()
def initial_gradient(
    call: Call, request: str, grad_o: Tensor, grad_final_state: Tensor | None
) -> Tensor:
    """The gradient of the state before the first tokens [N, HV, K, V], for any v and state."""
    state = call.q.new_zeros(call._replace(state_v_first=False).state_shape, dtype=call.state_dtype)
    call = call._replace(
        v=call.v.new_zeros(call.v.shape),
        initial_state=state,
        output_final_state=True,
        state_v_first=False,
    )
    saved = torch.ops.gdn.forward(*call, request, True)[2]
    if grad_final_state is not None:
        grad_final_state = grad_final_state.to(call.state_dtype)
    grads = torch.ops.gdn.backward(*call, request, saved, grad_o, grad_final_state)
    return grads[5]  # type: ignore[no-any-return]  # that of initial_state
