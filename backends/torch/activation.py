"""Gradients through the fused options. `gdn.definition.activate` computes their values.

L2 norm   y = r x,  r = 1 / sqrt(sum x^2 + eps)            dx = r (dy - y (y . dy))
gate      g = -exp(A_log) softplus(x),  x = raw + dt_bias  dx = g sigmoid(x) / softplus(x) dg
                                                           dA_log = sum g dg
bounded   g = L sigmoid(y),  y = exp(A_log) x              dx = g sigmoid(-y) exp(A_log) dg
                                                           dA_log = sum x dx
sigmoid   beta = c sigmoid(x)                              dx = beta (1 - beta / c) dbeta
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.definition import (
    L2_EPS,
    LARGE,
    TAIL,
    gate_floor,
    gate_slope,
    log_decay,
    write_strength,
)
from gdn.problem import Call


class RawGradients(NamedTuple):
    """Gradients of the call's own q, k, g and beta, and of A_log and dt_bias in their shapes if the
    gate is fused."""

    q: Tensor
    k: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None


def _backpropagate_l2_norm(x: Tensor, dy: Tensor) -> Tensor:
    x = x.to(dy.dtype)
    r = torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
    y = x * r
    return r * (dy - y * (y * dy).sum(-1, keepdim=True))


def _backpropagate_gate(call: Call, x: Tensor, g: Tensor, dg: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the terms of A_log's, from that of g."""
    g_dg = g * dg
    if call.gate_lower_bound is None:
        ratio = torch.sigmoid(x) / F.softplus(x.clamp(min=TAIL))
        return torch.where(x < TAIL, 1.0, ratio) * g_dg, g_dg  # there both factors are e^x
    A_log = call.A_log
    if A_log is not None:
        A_log = (A_log[:, None] if call.per_channel else A_log).to(x)
    slope, x = gate_slope(x, A_log), x.clamp(min=-LARGE, max=LARGE)
    dx = g_dg * torch.sigmoid(-slope * x) * slope
    return dx, x * dx


def backpropagate_activation(
    call: Call, dq: Tensor, dk: Tensor, dg: Tensor, dbeta: Tensor
) -> RawGradients:
    """Gradients of the call's q, k [m, C, H, K], g [m, C, HV] or [m, C, HV, K] and beta [m, C, HV],
    from those of the activated ones."""
    dA_log = ddt_bias = None
    g = call.g.to(dg.dtype)
    if call.use_gate_in_kernel:
        g = log_decay(g, call.A_log, call.dt_bias, call.gate_lower_bound)
    dg = dg.masked_fill(g <= gate_floor(dg.dtype), 0)  # where forward clamps g
    if call.use_qk_l2norm_in_kernel:
        dq, dk = _backpropagate_l2_norm(call.q, dq), _backpropagate_l2_norm(call.k, dk)
    if call.use_gate_in_kernel:
        raw = call.g.to(dg.dtype)
        x = raw if call.dt_bias is None else raw + call.dt_bias.to(raw)
        dg, by_A_log = _backpropagate_gate(call, x, g, dg)
        if call.A_log is not None:
            dA_log = by_A_log.sum((0, 1, 3) if call.per_channel else (0, 1))
        ddt_bias = None if call.dt_bias is None else dg.sum((0, 1))
    if call.use_beta_sigmoid_in_kernel:
        beta = write_strength(call.beta.to(dbeta.dtype), call.allow_neg_eigval)
        dbeta = beta * (1 - beta / (2 if call.allow_neg_eigval else 1)) * dbeta
    return RawGradients(dq, dk, dg, dbeta, dA_log, ddt_bias)
