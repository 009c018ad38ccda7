"""The fused options in kernels: the gate and the L2 norm, each with its derivative."""

from __future__ import annotations

import triton
import triton.language as tl

from gdn import definition

from .tiles import INTERPRETED

EPS = tl.constexpr(definition.L2_EPS)
FLOOR = tl.constexpr(definition.GATE_FLOOR)
LARGE = tl.constexpr(definition.LARGE)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2_flushed(x):
    """2^x in float32, 0 where it is below the smallest normal number. One instruction an element,
    where `tl.exp2` takes four more to find those."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exp_flushed(x):
    """e^x by `exp2_flushed`."""
    return exp2_flushed(x * LOG2_E)


@triton.jit
def reciprocal(x):
    """1 / x in float32, to its last bit or two: one instruction an element."""
    if INTERPRETED:
        return 1 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) by `exp_flushed` and `reciprocal`."""
    return reciprocal(1 + exp_flushed(-x))


@triton.jit
def log1p_over(y):
    """log(1 + y) / y for y from 0 to 1, to float32's precision, 1 at 0.

    With s = y / (2 + y) it is 2 atanh(s) / y, and s <= 1/3, so that the series s + s^3/3 + ... ends
    after eight terms.
    """
    r = reciprocal(2 + y)
    z = (y * r) * (y * r)
    series = 1 / 13 + z * (1 / 15)
    series = 1 / 11 + z * series
    series = 1 / 9 + z * series
    series = 1 / 7 + z * series
    series = 1 / 5 + z * series
    series = 1 / 3 + z * series
    return 2 * r * (1 + z * series)


@triton.jit
def load_A_log(A_log, head):
    """A_log of a value head, 0 if there is none."""
    if A_log is None:  # noqa: SIM108, Triton compiles both sides of an expression
        found = tl.full((), 0.0, tl.float32)
    else:
        found = tl.load(A_log + head).to(tl.float32)
    return found


@triton.jit
def bounded_gate_input(x, A_log):
    """x without infinities, since 0 inf is NaN, and its factor exp(A_log)."""
    x = tl.minimum(x, LARGE, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, -LARGE, propagate_nan=tl.PropagateNan.ALL)
    return x, tl.exp(tl.minimum(A_log, 80.0))


@triton.jit
def compute_log_decay(x, A_log, LOWER_BOUND: tl.constexpr):
    """The fused gate for x = g_raw + dt_bias: LOWER_BOUND sigmoid(exp(A_log) x), or without a bound
    -exp(A_log) softplus(x).

    With y = e^-|x|, softplus(x) is x + log(1 + y) where x > 0, and e^x log(1 + y) / y elsewhere.
    That e^x is merged into exp(A_log), since one of them may overflow where the other vanishes.
    """
    if LOWER_BOUND is not None:
        x, slope = bounded_gate_input(x, A_log)
        return LOWER_BOUND * sigmoid(slope * x)
    y = exp_flushed(-tl.abs(x))
    log_over_y = log1p_over(y)
    softplus = tl.where(x > 0, x + y * log_over_y, log_over_y)
    return -exp_flushed(A_log + tl.minimum(x, 0.0)) * softplus


@triton.jit
def backpropagate_gate(dg, x, A_log, log_decay, LOWER_BOUND: tl.constexpr):
    """dx, and the terms of dA_log, from dg of log_decay = `compute_log_decay`. Both are zero where
    log_decay is at most FLOOR, since kernels clamp it there."""
    if LOWER_BOUND is not None:
        x, slope = bounded_gate_input(x, A_log)
        dx = dg * log_decay * sigmoid(-slope * x) * slope
        terms = x * dx
    else:  # the derivative is -exp(A_log) sigmoid(x)
        dx = dg * -exp_flushed(A_log + tl.minimum(x, 0.0))
        dx *= reciprocal(1 + exp_flushed(-tl.abs(x)))
        terms = dg * log_decay
    clamped = log_decay <= FLOOR
    return tl.where(clamped, 0.0, dx), tl.where(clamped, 0.0, terms)


@triton.jit
def compute_reciprocal_norms(x):
    """1 / sqrt(sum x^2 + eps) of each row."""
    x32 = x.to(tl.float32)
    return 1 / tl.sqrt(tl.sum(x32 * x32, axis=1) + EPS)


@triton.jit
def backpropagate_norm(dy, x, r, y_dot_dy=None):
    """dx of the rows y = r x with r = 1 / sqrt(sum x^2 + eps), from dy. y_dot_dy: rowsum(y * dy) of
    whole rows, if these are some of their channels."""
    y = r[:, None] * x
    sums = tl.sum(y * dy, axis=1) if y_dot_dy is None else y_dot_dy
    return r[:, None] * (dy - y * sums[:, None])
