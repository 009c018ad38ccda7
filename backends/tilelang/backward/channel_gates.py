"""`channel_gradients.py`: e^g of a chunk and value head, and the gradients of its gates and beta.

Entries of a thread are those of `channel_entries.py`. They lie in `smem.aside`, a column a thread,
so that the arithmetic of the gate is a loop and not repeated in the code for every entry.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.definition import GATE_FLOOR, LARGE

from ..tile.gate_math import fused_log_decay, log_decay_slope, stored_R_scale
from ..tile.indexing import rolled_loop
from .gradients_memory import COLUMNS

BLOCKS_AT_ONCE = 2
"""Blocks of 8 tokens whose gates are in flight at a time."""


@T.macro
def load_decays(
    g: Any, A_log: Any, dt_bias: Any, smem: Any, batch: Any, token: Any, live: Any, head: Any,
    h: Any, x: Any, gate: bool, bias: bool, has_A_log: bool, bound: float | None,
) -> None:  # fmt: skip
    """smem.aside = e^g of the thread's entries; 1 past the end of the sequence."""
    lane, thread = x % 32, h * 128 + x
    channel = h * COLUMNS + x // 32 * 16 + lane // 4
    value = T.alloc_var("float32")
    for b in T.unroll(8):
        for c in T.unroll(2):
            for e in T.unroll(2):
                i = 8 * b + lane % 4 * 2 + e
                smem.aside[2 * b + c, thread, e] = 0.0
                if i < live:
                    smem.aside[2 * b + c, thread, e] = T.cast(
                        g[batch, T.cast(token + i, "int64"), head, channel + 8 * c], "float32"
                    )
    for b in rolled_loop(8):
        for c in T.unroll(2):
            for e in T.unroll(2):
                value = smem.aside[2 * b + c, thread, e]
                if bias:
                    value += dt_bias[head, channel + 8 * c]
                if gate:
                    value = fused_log_decay(
                        value, A_log[head] if has_A_log else T.float32(0), bound
                    )
                smem.aside[2 * b + c, thread, e] = T.if_then_else(
                    8 * b + lane % 4 * 2 + e < live, T.exp(value), 1.0
                )


@T.macro
def take_decays(smem: Any, regs: Any, thread: Any) -> None:
    """Factors of single tokens: prefixes e^g, and suffixes 1."""
    for n in T.unroll(int(smem.aside.shape[0])):
        for e in T.vectorized(2):
            regs.prefix[2 * n + e] = smem.aside[n, thread, e]
        for e in T.unroll(2):
            regs.suffix[2 * n + e] = 1.0


@T.macro
def put_terms(smem: Any, regs: Any, thread: Any) -> None:
    """smem.aside = regs.terms, in place of e^g."""
    for n in T.unroll(int(smem.aside.shape[0])):
        for e in T.vectorized(2):
            smem.aside[n, thread, e] = regs.terms[2 * n + e]


@T.macro
def take_terms(smem: Any, regs: Any, thread: Any) -> None:
    """The inverse of `put_terms`."""
    for n in T.unroll(int(smem.aside.shape[0])):
        for e in T.vectorized(2):
            regs.terms[2 * n + e] = smem.aside[n, thread, e]


@T.macro
def backpropagate_gate(
    dg: Any, value: Any, A_log_value: Any, dA_log: Any, bound: float | None
) -> None:
    """dg[0] of a fused gate with the input value[0] becomes that of its input; dA_log[0] += the
    entry's share."""
    g, slope = T.alloc_local((1,), "float32"), T.alloc_local((1,), "float32")
    g[0] = fused_log_decay(value[0], A_log_value, bound)
    if g[0] <= GATE_FLOOR:
        dg[0] = 0.0
    elif bound is None:
        dA_log[0] += dg[0] * g[0]
        dg[0] *= log_decay_slope(value[0], T.exp(-T.abs(value[0])), A_log_value)
    else:
        value[0] = T.min(T.max(value[0], -LARGE), LARGE)
        slope[0] = T.exp(T.min(A_log_value, 80.0))
        dg[0] *= g[0] * slope[0] / (1 + T.exp(slope[0] * value[0]))
        dA_log[0] += value[0] * dg[0]


@T.macro
def store_gate_gradients(
    g: Any, A_log: Any, dt_bias: Any, dg: Any, ddt_bias: Any, smem: Any, regs: Any, batch: Any,
    token: Any, live: Any, slot: Any, head: Any, h: Any, x: Any, gate: bool, bias: bool,
    has_A_log: bool, bound: float | None,
) -> None:  # fmt: skip
    """Store dg of the thread's entries, regs.terms, and the chunk's share of ddt_bias; leave a
    warp's share of dA_log in smem."""
    lane, thread = x % 32, h * 128 + x
    channel = h * COLUMNS + x // 32 * 16 + lane // 4
    value, d = T.alloc_local((1,), "float32"), T.alloc_local((1,), "float32")
    A_sum, bias_sum = T.alloc_local((1,), "float32"), T.alloc_local((2,), "float32")
    raw = T.alloc_local((4 * BLOCKS_AT_ONCE,), g.dtype)
    A_sum[0] = 0.0
    T.clear(bias_sum)
    put_terms(smem, regs, thread)
    for step in rolled_loop(8 // BLOCKS_AT_ONCE):
        for n in T.unroll(4 * BLOCKS_AT_ONCE):
            i = 8 * (step * BLOCKS_AT_ONCE + n // 4) + lane % 4 * 2 + n % 2
            raw[n] = 0
            if i < live:
                at = T.cast(token + i, "int64")
                raw[n] = g[batch, at, head, channel + n // 2 % 2 * 8]
        for n in T.unroll(4 * BLOCKS_AT_ONCE):
            i = 8 * (step * BLOCKS_AT_ONCE + n // 4) + lane % 4 * 2 + n % 2
            if i < live:
                d[0] = smem.aside[2 * BLOCKS_AT_ONCE * step + n // 2, thread, n % 2]
                value[0] = T.cast(raw[n], "float32")
                if bias:
                    value[0] += dt_bias[head, channel + n // 2 % 2 * 8]
                if gate:
                    backpropagate_gate(
                        d, value, A_log[head] if has_A_log else T.float32(0), A_sum, bound
                    )
                    bias_sum[n // 2 % 2] += d[0]
                elif value[0] <= GATE_FLOOR:
                    d[0] = 0.0
                at = T.cast(token + i, "int64")
                dg[batch, at, head, channel + n // 2 % 2 * 8] = d[0]
    if bias:
        for c in T.unroll(2):
            bias_sum[c] += T.shfl_xor(bias_sum[c], 1)
            bias_sum[c] += T.shfl_xor(bias_sum[c], 2)
            if T.And(lane % 4 == 0, live > 0):
                ddt_bias[slot, head, channel + 8 * c] = bias_sum[c]
    if gate and has_A_log:
        A_sum[0] = T.warp_reduce_sum(A_sum[0])
        if lane == 0:
            smem.dA_log[h * 4 + x // 32] = A_sum[0]


@T.macro
def store_beta_gradient(
    dbeta: Any, dA_log: Any, smem: Any, batch: Any, token: Any, live: Any, slot: Any, head: Any,
    i: Any, has_A_log: bool, gate: bool, sigmoid: bool, double: bool,
) -> None:  # fmt: skip
    """dbeta of token i, and with the first token the chunk's share of dA_log."""
    total = T.alloc_local((1,), "float32")
    total[0] = 0.0
    for warp in T.unroll(int(smem.dots.shape[1])):
        total[0] += smem.dots[0, warp, i]
    beta = smem.beta[i]
    total[0] = smem.rv[i] + total[0] / stored_R_scale(beta)
    if sigmoid:
        total[0] *= beta * (1.0 - (0.5 if double else 1.0) * beta)
    if i < live:
        dbeta[batch, token + i, head] = total[0]
    if gate and has_A_log:  # noqa: SIM102, known before the kernel is; the next is not
        if T.And(i == 0, live > 0):
            total[0] = 0.0
            for warp in T.unroll(int(smem.dots.shape[1])):
                total[0] += smem.dA_log[warp]
            dA_log[slot, head] = total[0]
