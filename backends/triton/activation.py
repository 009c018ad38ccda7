"""The fused options in kernels: the gate and the L2 norm, each with its derivative."""

from __future__ import annotations

import triton
import triton.language as tl

from gdn import definition

EPS = tl.constexpr(definition.L2_EPS)
FLOOR = tl.constexpr(definition.GATE_FLOOR)
LARGE = tl.constexpr(definition.LARGE)


@triton.jit
def load_A_log(A_log, head):
    """A_log of a value head, 0 if there is none."""
    if A_log is None:  # noqa: SIM108, Triton compiles both sides of an expression
        found = tl.full((), 0.0, tl.float32)
    else:
        found = tl.load(A_log + head).to(tl.float32)
    return found


@triton.jit
def _bounded_gate_input(x, A_log):
    """x without infinities, since 0 inf is NaN, and its factor exp(A_log)."""
    x = tl.where(x > LARGE, LARGE, x)  # tl.minimum would drop NaN
    x = tl.where(x < -LARGE, -LARGE, x)
    return x, tl.exp(tl.minimum(A_log, 80.0))


@triton.jit
def compute_log_decay(x, A_log, LOWER_BOUND: tl.constexpr):
    """The fused gate for x = g_raw + dt_bias: LOWER_BOUND sigmoid(exp(A_log) x), or without a bound
    -exp(A_log) softplus(x).

    With y = e^-|x|, softplus(x) is x + log(1 + y) where x > 0, and e^x log(1 + y) / y elsewhere.
    That e^x is merged into exp(A_log), since one of them may overflow where the other vanishes.
    """
    if LOWER_BOUND is not None:
        x, slope = _bounded_gate_input(x, A_log)
        return LOWER_BOUND * tl.sigmoid(slope * x)
    y = tl.exp(-tl.abs(x))
    log_over_y = tl.where(y < 1e-4, 1 - y / 2, tl.log(1 + y) / y)
    return -tl.exp(A_log + tl.minimum(x, 0.0)) * tl.where(x > 0, x + tl.log(1 + y), log_over_y)


@triton.jit
def backpropagate_gate(dg, x, A_log, log_decay, LOWER_BOUND: tl.constexpr):
    """dx, and the terms of dA_log, from dg of log_decay = `compute_log_decay`. Both are zero where
    log_decay is at most FLOOR, since kernels clamp it there."""
    if LOWER_BOUND is not None:
        x, slope = _bounded_gate_input(x, A_log)
        dx = dg * log_decay * tl.sigmoid(-slope * x) * slope
        terms = x * dx
    else:  # the derivative is -exp(A_log) sigmoid(x)
        dx = dg * -tl.exp(A_log + tl.minimum(x, 0.0)) / (1 + tl.exp(-tl.abs(x)))
        terms = dg * log_decay
    clamped = log_decay <= FLOOR
    return tl.where(clamped, 0.0, dx), tl.where(clamped, 0.0, terms)


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
