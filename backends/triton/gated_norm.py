"""The gated RMS norm, forward and backward, in one kernel each, on rows of any strides.

    y = weight x r s,    r = 1 / sqrt(mean x^2 + eps),    s = silu(gate) or sigmoid(gate)

    a = weight dy s,     dx = r (a - x r mean(a x r)),     dgate = weight x r dy s',
    dweight = sum over rows of dy s x r

Computed in float32; r is computed again in backward, so that nothing but the inputs is kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE = 2048
"""Elements of a program's tile."""
_PROGRAMS = 528
"""Programs of backward at most, four for each SM of an H100; each sums its own dweight."""


@triton.jit
def _locate(row, heads, token_stride, head_stride):
    """Where rows lie: tokens times heads of them."""
    return (row // heads).to(tl.int64) * token_stride + (row % heads).to(tl.int64) * head_stride


@triton.jit
def _activate(gate, SIGMOID: tl.constexpr):
    """The gate's activation and its derivative."""
    sigmoid = tl.sigmoid(gate)
    if SIGMOID:
        return sigmoid, sigmoid * (1 - sigmoid)
    return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))


@triton.jit(do_not_specialize=["rows"])
def gated_norm_kernel(
    x, gate, weight, y, rows, eps, heads,
    x_token, x_head, gate_token, gate_head,
    V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < V)[None, :]
    x_rows = x + _locate(row, heads, x_token, x_head)[:, None]
    gate_rows = gate + _locate(row, heads, gate_token, gate_head)[:, None]
    x_tile = tl.load(x_rows + column, mask, other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
    gate_tile = tl.load(gate_rows + column, mask, other=0.0).to(tl.float32)
    weight_row = tl.load(weight + column, column < V, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(x_tile * x_tile, 1) / V + eps)
    s, _ = _activate(gate_tile, SIGMOID)
    found = x_tile * r[:, None] * weight_row * s
    tl.store(y + row[:, None] * V + column, found.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def gated_norm_backward_kernel(
    x, gate, weight, dy, dx, dgate, dweight, rows, eps, heads,
    x_token, x_head, gate_token, gate_head, dy_token, dy_head,
    V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    weight_row = tl.load(weight + column, column < V, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & (column < V)[None, :]
        x_rows = x + _locate(row, heads, x_token, x_head)[:, None]
        gate_rows = gate + _locate(row, heads, gate_token, gate_head)[:, None]
        dy_rows = dy + _locate(row, heads, dy_token, dy_head)[:, None]
        x_tile = tl.load(x_rows + column, mask, other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
        gate_tile = tl.load(gate_rows + column, mask, other=0.0).to(tl.float32)
        dy_tile = tl.load(dy_rows + column, mask, other=0.0).to(tl.float32)
        r = 1 / tl.sqrt(tl.sum(x_tile * x_tile, 1) / V + eps)
        s, slope = _activate(gate_tile, SIGMOID)
        normalized = x_tile * r[:, None]
        sums += dy_tile * s * normalized
        a = weight_row * dy_tile * s
        mean = tl.sum(a * normalized, 1) / V
        dx_tile = r[:, None] * (a - normalized * mean[:, None])
        dgate_tile = weight_row * normalized * dy_tile * slope
        place = row[:, None] * V + column
        tl.store(dx + place, dx_tile.to(dx.dtype.element_ty), mask)
        tl.store(dgate + place, dgate_tile.to(dgate.dtype.element_ty), mask)
    tl.store(dweight + tl.program_id(0) * V + column, tl.sum(sums, 0), column < V)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, sigmoid: bool
    ) -> Tensor:
        rows, constants = _tile(x, sigmoid)
        y = x.new_empty(x.shape)
        if rows:
            with _on_device(x):
                gated_norm_kernel[triton.cdiv(rows, constants["ROWS"]),](
                    x, gate, weight, y, rows, eps, x.shape[1], *x.stride()[:2], *gate.stride()[:2],
                    **constants,
                )  # fmt: skip
        ctx.save_for_backward(x, gate, weight)
        ctx.eps, ctx.sigmoid = eps, sigmoid
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        dy = _with_dense_rows(dy)
        rows, constants = _tile(x, ctx.sigmoid)
        programs = min(triton.cdiv(rows, constants["ROWS"]), _PROGRAMS)
        dx, dgate = x.new_empty(x.shape), gate.new_empty(x.shape)
        dweight = x.new_empty((programs, x.shape[2]), dtype=torch.float32)
        if rows:
            with _on_device(x):
                gated_norm_backward_kernel[programs,](
                    x, gate, weight, dy, dx, dgate, dweight, rows, ctx.eps, x.shape[1],
                    *x.stride()[:2], *gate.stride()[:2], *dy.stride()[:2], **constants,
                )  # fmt: skip
        return dx, dgate, dweight.sum(0).to(weight.dtype), None, None


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, sigmoid: bool = False
) -> Tensor:
    """y in x's dtype and shape. Differentiable once in x, gate and weight.

    Args:
        x, gate: [..., heads, V] or [rows, V], of float32, bfloat16 or float16. Rows may have any
            strides; they are read where they lie.
        weight: [V].
        eps: added to the mean of squares.
        sigmoid: whether the gate's activation is the sigmoid, else SiLU.
    """
    inputs = (_with_dense_rows(_by_tokens(t)) for t in (x, gate))
    y: Tensor = _GatedNorm.apply(*inputs, weight.contiguous(), eps, sigmoid)
    return y.view(x.shape)


def _by_tokens(x: Tensor) -> Tensor:
    """x as [tokens, heads, V]."""
    return x[:, None] if x.dim() == 2 else x.flatten(0, -3)


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _tile(x: Tensor, sigmoid: bool) -> tuple[int, dict[str, Any]]:
    """Rows of V elements in x, and the kernels' constants."""
    columns = triton.next_power_of_2(x.shape[2])
    constants = {"V": x.shape[2], "COLUMNS": columns, "ROWS": max(1, _TILE // columns)}
    return x.shape[0] * x.shape[1], constants | {"SIGMOID": sigmoid}


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
