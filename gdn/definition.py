"""The definition of the op: the gated delta rule, token by token. Everything else cites this file.

For each sequence and value head, with state S in R^{K x V}, S_0 = initial_state or 0:

    S <- exp(g_t) S                          decay first; per channel S <- diag(exp(g_t)) S
    u  = beta_t (v_t - S^T k_t)              error against the decayed state
    S <- S + k_t u^T
    o_t = S^T (scale q_t)                    read after the write

(arXiv 2412.06464, equation 10; with a decay per channel, g_t in R^K, Kimi Delta Attention, arXiv
2510.26692). Value head h reads q/k head h // (HV / H).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.problem import Call

L2_EPS = 1e-6
"""Added to the sum of squares before the root in the fused L2 norm."""
TAIL = -40.0
"""Below it softplus(x) is e^x, in float64 too."""
LARGE = 1e30
"""Raw gates are clamped to this, up and down, where the gate has a lower bound: 0 inf is NaN."""
GATE_FLOOR = -104.0
"""A log decay whose exponential is zero in float32."""


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, in x's dtype."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def initialize_gates(
    A_log: Tensor, dt_bias: Tensor, generator: torch.Generator | None = None
) -> None:
    """Fill the gate parameters of a new layer in place, as the layers of Qwen3-Next and Qwen3.5 in
    transformers do: A_log is the log of uniform numbers in (0.01, 16), dt_bias is ones. With
    A = 16 a token decays the state by e^-21.

    The cases of `gdn.testing` call these gates "fast". Their "model" gates are those of a new layer
    of fla, which has Mamba's smaller steps (dt_bias is the inverse softplus of 1e-3 to 0.1): about
    -0.2 a token, so that states live longer."""
    with torch.no_grad():
        A_log.uniform_(1e-2, 16, generator=generator).log_()
        dt_bias.fill_(1)


def log_decay(
    g_raw: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None = None,
) -> Tensor:
    """The fused gate, in g_raw's dtype: g = -exp(A_log) softplus(g_raw + dt_bias), or with a lower
    bound g = lower_bound sigmoid(exp(A_log) (g_raw + dt_bias)), where A_log may be None for 0.

    g_raw [B, T, HV] or per channel [B, T, HV, K]; A_log [HV]; dt_bias [HV], or [HV, K] per channel.

    The former is computed as -exp(A_log + log softplus), since exp(A_log) may overflow where
    softplus is close to zero. The exponent is clamped at 80, where exp(g) is zero.
    """
    x = g_raw if dt_bias is None else g_raw + dt_bias.to(g_raw)
    if A_log is not None:
        A_log = (A_log[:, None] if g_raw.dim() == 4 else A_log).to(g_raw)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(gate_slope(x, A_log) * x.clamp(min=-LARGE, max=LARGE))
    assert A_log is not None  # validated
    return -(A_log + log_softplus(x)).clamp(max=80.0).exp()


def gate_slope(x: Tensor, A_log: Tensor | None) -> Tensor:
    """exp(A_log), the factor of x in the gate with a lower bound, at most e^80 so that it is finite
    in float32. 1 without an A_log. A_log has x's dtype and broadcasts with it."""
    return x.new_ones(()) if A_log is None else A_log.clamp(max=80.0).exp()


def log_softplus(x: Tensor) -> Tensor:
    """log(log(1 + e^x)). Below -40, where 1 + e^x rounds to 1, the result is x."""
    # threshold 80: by default F.softplus is linear from 20 on, but float64 still resolves exp(-20)
    return torch.where(x < TAIL, x, F.softplus(x.clamp(min=TAIL), threshold=80.0).log())


def gate_floor(dtype: torch.dtype) -> float:
    """A log decay whose exponential is zero in the compute dtype (float64 or float32). Code that
    sums gates clamps them to it first: the sums then keep their precision, and -inf is a reset. The
    gradient of a clamped gate is zero."""
    return -746.0 if dtype == torch.float64 else GATE_FLOOR


def write_strength(beta_raw: Tensor, allow_neg_eigval: bool) -> Tensor:
    """The fused sigmoid: beta = sigmoid(beta_raw), in (0, 1); times 2 with allow_neg_eigval."""
    beta = torch.sigmoid(beta_raw)
    return 2 * beta if allow_neg_eigval else beta


def activate(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, g, beta of a call in `dtype`, with its fused options applied (differentiable)."""
    q, k, g, beta = (x.to(dtype) for x in (call.q, call.k, call.g, call.beta))
    if call.use_qk_l2norm_in_kernel:
        q, k = l2_normalize(q), l2_normalize(k)
    if call.use_gate_in_kernel:
        g = log_decay(g, call.A_log, call.dt_bias, call.gate_lower_bound)
    if call.use_beta_sigmoid_in_kernel:
        beta = write_strength(beta, call.allow_neg_eigval)
    return q, k, g, beta


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, on scaled q and k [B, T, HV, K]; v [B, T, HV, V]; g [B, T, HV], or
    [B, T, HV, K] per channel; beta [B, T, HV].

    Returns o [B, T, HV, V] and the state [B, HV, K, V] after the last token. Any floating dtype.
    """
    decay = (g if g.dim() == 4 else g[..., None]).exp()[..., None]  # [B, T, HV, K or 1, 1]
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t] * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        u = beta[:, t, :, None] * error
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else v.clone()), state


def gated_delta_rule(call: Call, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The reference result of one call: o [B, T, HV, V] and the final state (in the call's layout),
    in `dtype`.

    Differentiable any number of times in the eight differentiable inputs. Slow: it computes token
    by token and reads cu_seqlens on the host. Meant for float64, or float32 on devices without it.
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
        results = [
            recurrence(*(x[:, start:end] for x in (q, k, v, g, beta)), state[n : n + 1])  # type: ignore[call-arg]
            for n, (start, end) in enumerate(itertools.pairwise(bounds))
        ]
        o = torch.cat([result[0] for result in results], 1) if results else v.clone()
        state = torch.cat([result[1] for result in results]) if results else state
    return o, state.mT if call.state_v_first else state
