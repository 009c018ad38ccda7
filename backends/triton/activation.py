"""The fused options in kernels: the gate and the L2 norm, each with its derivative."""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.definition import GATE_FLOOR, L2_EPS

EPS = tl.constexpr(L2_EPS)
FLOOR = tl.constexpr(GATE_FLOOR)


@triton.jit
def compute_log_decay(x, A_log):
    """The fused gate, -exp(A_log) softplus(x), for x = g_raw + dt_bias.

    With y = e^-|x|, softplus(x) is x + log(1 + y) where x > 0, and e^x log(1 + y) / y elsewhere.
    That e^x is merged into exp(A_log), since one of them may overflow where the other vanishes.
    """
    y = tl.exp(-tl.abs(x))
    log_over_y = tl.where(y < 1e-4, 1 - y / 2, tl.log(1 + y) / y)
    return -tl.exp(A_log + tl.minimum(x, 0.0)) * tl.where(x > 0, x + tl.log(1 + y), log_over_y)


@triton.jit
def compute_log_decay_slope(x, A_log):
    """The derivative of `compute_log_decay` by x, -exp(A_log) sigmoid(x)."""
    return -tl.exp(A_log + tl.minimum(x, 0.0)) / (1 + tl.exp(-tl.abs(x)))


@triton.jit
def compute_reciprocal_norms(x):
    """1 / sqrt(sum x^2 + eps) of each row."""
    x32 = x.to(tl.float32)
    return 1 / tl.sqrt(tl.sum(x32 * x32, axis=1) + EPS)


@triton.jit
def backpropagate_norm(dy, x, r):
    """dx of the rows y = r x with r = 1 / sqrt(sum x^2 + eps), from dy."""
    y = r[:, None] * x
    return r[:, None] * (dy - y * tl.sum(y * dy, axis=1)[:, None])
