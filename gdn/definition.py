"""The definition of the op: the gated delta rule, token by token. Everything else cites this file.

For each sequence and value head, with state S in R^{K x V}, S_0 = initial_state or 0:

    S <- exp(g_t) S                          decay first
    u  = beta_t (v_t - S^T k_t)              error against the decayed state
    S <- S + k_t u^T
    o_t = S^T (scale q_t)                    read after the write

(arXiv 2412.06464, equation 10). Value head h reads q/k head h // (HV / H).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.problem import Call

L2_EPS = 1e-6
"""Added to the sum of squares before the root in the fused L2 norm."""
GATE_FLOOR = -104.0
"""Its exponential is zero in float32."""


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, in x's dtype."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def log_decay(g_raw: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    """The fused gate: g = -exp(A_log) softplus(g_raw + dt_bias), in g_raw's dtype; A_log, dt_bias
    [HV].

    Computed as -exp(A_log + log softplus), since one factor may overflow where the other vanishes;
    the exponent ends at 80, where nothing is left of exp(g).
    """
    x = g_raw if dt_bias is None else g_raw + dt_bias.to(g_raw)
    return -(A_log.to(g_raw) + log_softplus(x)).clamp(max=80.0).exp()


def log_softplus(x: Tensor) -> Tensor:
    """log(log(1 + e^x)), which is x where e^x is lost beside 1."""
    # threshold 80: the linear branch of F.softplus starts at 20, where float64 still sees exp(-20)
    return torch.where(x < -40, x, F.softplus(x.clamp(min=-40), threshold=80.0).log())


def gate_floor(dtype: torch.dtype) -> float:
    """The log decay from which on its exponential is zero in the compute dtype (float64 or
    float32). Whoever sums gates clamps them here first: sums then keep their digits, whatever
    precedes or follows, and -inf is a reset. The gradient there is zero."""
    return -746.0 if dtype == torch.float64 else GATE_FLOOR


def write_strength(beta_raw: Tensor, allow_neg_eigval: bool) -> Tensor:
    """The fused sigmoid: beta = sigmoid(beta_raw), in (0, 1); times 2 with allow_neg_eigval."""
    beta = torch.sigmoid(beta_raw)
    return 2 * beta if allow_neg_eigval else beta


def activate(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, g, beta of a call in `dtype`, with the fused options it asks for applied
    (differentiable)."""
    q, k, g, beta = (x.to(dtype) for x in (call.q, call.k, call.g, call.beta))
    if call.use_qk_l2norm_in_kernel:
        q, k = l2_normalize(q), l2_normalize(k)
    if call.use_gate_in_kernel:
        assert call.A_log is not None  # validated
        g = log_decay(g, call.A_log, call.dt_bias)
    if call.use_beta_sigmoid_in_kernel:
        beta = write_strength(beta, call.allow_neg_eigval)
    return q, k, g, beta


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, on q (scaled), k [B, T, HV, K]; v [B, T, HV, V]; g, beta [B, T, HV].

    Returns o [B, T, HV, V] and the state [B, HV, K, V] after the last token. Any floating dtype.
    """
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None, None] * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        u = beta[:, t, :, None] * error
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else v.clone()), state


def gated_delta_rule(call: Call, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The truth for one call: o [B, T, HV, V] and the final state (in the call's layout), in
    `dtype`.

    Differentiable (also twice) in the eight differentiable inputs. Slow: one step a token, and
    cu_seqlens is read on the host. Meant for float64, and float32 where float64 does not exist.
    """
    q, k, g, beta = activate(call, dtype)
    v, group = call.v.to(dtype), call.v.shape[2] // call.q.shape[2]
    q, k = (x.repeat_interleave(group, dim=2) for x in (call.scale * q, k))
    N, HV, K, V = call.sequences, v.shape[2], q.shape[3], v.shape[3]
    if call.initial_state is None:
        state = v.new_zeros(N, HV, K, V)
    else:
        state = call.initial_state.to(dtype)
        state = state.mT if call.state_v_first else state

    if call.cu_seqlens is None:
        o, state = recurrence(q, k, v, g, beta, state)
    else:
        bounds = call.cu_seqlens.tolist()
        pieces = [
            recurrence(*(x[:, start:end] for x in (q, k, v, g, beta)), state[n : n + 1])  # type: ignore[call-arg]
            for n, (start, end) in enumerate(itertools.pairwise(bounds))
        ]
        o = torch.cat([piece[0] for piece in pieces], 1) if pieces else v.clone()
        state = torch.cat([piece[1] for piece in pieces]) if pieces else state
    return o, state.mT if call.state_v_first else state
