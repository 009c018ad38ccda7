"""Gradients through the fused options. `gdn.definition.activate` computes their values.

L2 norm   y = r x,  r = 1 / sqrt(sum x^2 + eps)            dx = r (dy - y (y . dy))
gate      g = -exp(A_log) softplus(x),  x = raw + dt_bias  dx = g sigmoid(x) / softplus(x) dg
                                                           dA_log = sum g dg
sigmoid   beta = c sigmoid(x)                              dx = beta (1 - beta / c) dbeta
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.definition import L2_EPS, TAIL, gate_floor, log_decay, write_strength
from gdn.problem import Call


class RawGradients(NamedTuple):
    """Gradients of the call's own q, k, g and beta, and of A_log and dt_bias [HV] if the gate is
    fused."""

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


def backpropagate_activation(
    call: Call, dq: Tensor, dk: Tensor, dg: Tensor, dbeta: Tensor
) -> RawGradients:
    """Gradients of the call's q, k [m, C, H, K] and g, beta [m, C, HV], from those of the activated
    ones."""
    dA_log = ddt_bias = None
    g = call.g.to(dg.dtype)
    if call.A_log is not None:
        g = log_decay(g, call.A_log, call.dt_bias)
    dg = dg.masked_fill(g <= gate_floor(dg.dtype), 0)  # where forward clamps g
    if call.use_qk_l2norm_in_kernel:
        dq, dk = _backpropagate_l2_norm(call.q, dq), _backpropagate_l2_norm(call.k, dk)
    if call.use_gate_in_kernel:
        assert call.A_log is not None  # validated
        raw = call.g.to(dg.dtype)
        x = raw if call.dt_bias is None else raw + call.dt_bias.to(raw)
        g_dg = g * dg
        dA_log = g_dg.sum((0, 1))
        ratio = torch.sigmoid(x) / F.softplus(x.clamp(min=TAIL))
        dg = torch.where(x < TAIL, 1.0, ratio) * g_dg  # there both factors are e^x
        ddt_bias = None if call.dt_bias is None else dg.sum((0, 1))
    if call.use_beta_sigmoid_in_kernel:
        beta = write_strength(call.beta.to(dbeta.dtype), call.allow_neg_eigval)
        dbeta = beta * (1 - beta / (2 if call.allow_neg_eigval else 1)) * dbeta
    return RawGradients(dq, dk, dg, dbeta, dA_log, ddt_bias)
