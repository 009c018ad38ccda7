"""Forward, stage 1 of bfloat16 calls with a decay per channel: sums of the gates of a chunk.

    G_i = sum of g_t / ln 2 over tokens t <= i of i's half of the chunk, in float32, [C, K]

A program takes a chunk and value head, and a thread takes a channel, so that sums over tokens need
no other thread. For that it reads g one number at a time. Sums start again at the second half, and
no g counts as less than FORGOTTEN, so that a sum is at most 2^12. Its roundings over a half then
change a decay by 2^-9 at most, as much as bfloat16 rounds a factor.

Sums lie in the memory of W and Q_IN, until `channel_forward.py` writes those in their place, BLOCK
channels of all tokens at a time. The sums of BLOCK channels take the bytes of their W and Q_IN: the
first half of the channels has those of W, the second half those of Q_IN.

The first place of row FARTHEST of `factors` has the largest distance of a sum of the chunk from
that of the middle of its half (`channel_blocks.py`). The next stage replaces it where backward
follows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import (
    LOG2_E,
    bounded_gate_input,
    compute_log_decay,
    exp2_flushed,
    load_A_log,
    sigmoid,
)
from .chunk_buffers import GATE_SUM, NUM_DECAYED_ROWS, NUM_FACTORS, Q_IN
from .indexing import COUNTS, locate_chunk
from .launch import ANY_ALIGNMENT
from .tiles import INTERPRETED, find_batch_row

BLOCK = tl.constexpr(32)
"""Channels whose sums and rows share memory."""
FARTHEST = GATE_SUM
FORGOTTEN = tl.constexpr(-128.0)
"""A log decay in base 2 that `exp2_flushed` makes 0 on a GPU. Smaller ones count as this."""
MODEST = tl.constexpr(40.0)
"""The largest A_log with which e^A_log and e^-|x| do not leave float32's range one by one."""


@triton.jit
def sum_entries(decayed_rows, chunk_head, row, channel, BK: tl.constexpr, C: tl.constexpr):
    """Pointers to the sums of tokens `row` and channels `channel`, which are broadcast."""
    HALF: tl.constexpr = BLOCK // 2
    sums = decayed_rows.to(tl.pointer_type(tl.float32))
    sums += chunk_head * (NUM_DECAYED_ROWS * C * BK // 2)
    second = channel // HALF % 2  # 1 in the memory of Q_IN
    within = channel // BLOCK * HALF + channel % HALF
    return sums + (row * (BK // 2) + (second * (Q_IN * C * BK // 2) + within))


@triton.jit
def _hide_alignment(pointer):
    """The pointer, without what Triton knows of its alignment: it loads and stores one number at a
    time, so that a thread has a channel."""
    if INTERPRETED:
        return pointer
    address = tl.inline_asm_elementwise(
        "mov.b64 $0, $1;", "=l,l", [pointer.to(tl.int64)], dtype=tl.int64, is_pure=True, pack=1
    )
    return address.to(pointer.dtype)


@triton.jit
def _select_token(x, token, HALF: tl.constexpr):
    """Token number `token` of each half of x [2, HALF, D] in float32, [2, D], without rounding:
    other summands are zero bits."""
    selected = tl.arange(0, HALF)[None, :, None] == token
    bits = tl.where(selected, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _log1p_over(y):
    """log(1 + y) / y for y from 0 to 1, right to 1.4e-6: a polynomial, since bfloat16 calls need no
    more."""
    p = 0.149224922 + y * (-0.0664024204 + y * 0.014141147)
    p = 0.331094772 + y * (-0.235039398 + y * p)
    return 0.999998748 + y * (-0.499869704 + y * p)


@triton.jit
def _quick_log2_decay(x, A_log):
    """`compute_log_decay` without a bound in base 2, for A_log up to MODEST."""
    y = exp2_flushed(-LOG2_E * tl.abs(x))
    return (-LOG2_E * tl.exp(A_log)) * (tl.maximum(x, 0.0) + y * _log1p_over(y))


@triton.jit
def _rows_by_halves(C: tl.constexpr):
    """The numbers of a chunk's tokens, [2, C // 2, 1]."""
    HALF: tl.constexpr = C // 2
    return tl.arange(0, 2)[:, None, None] * HALF + tl.arange(0, HALF)[None, :, None]


@triton.jit
def _load_log2_decays(
    g, A_log, dt_bias, first_token, tokens, head, G_STRIDES: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr, FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr,
    QUICK: tl.constexpr,
):  # fmt: skip
    """Log decays in base 2, at least FORGOTTEN, and zero past the end and past K, by halves of the
    chunk: [2, C // 2, BK]."""
    row, channel = _rows_by_halves(C), tl.arange(0, BK)[None, None, :]
    g += first_token * G_STRIDES[1] + head * G_STRIDES[2] + row * G_STRIDES[1] + channel
    mask = channel < K if QUICK else (row < tokens) & (channel < K)
    raw = tl.load(g, mask=mask, other=0.0).to(tl.float32)
    if FUSED_GATE:
        A_log = load_A_log(A_log, head)
        if dt_bias is not None:
            bias = tl.load(dt_bias + head * K + channel, mask=channel < K, other=0.0)
            raw += bias.to(tl.float32)
        if LOWER_BOUND is not None:
            x, slope = bounded_gate_input(raw, A_log)
            log2_decay = (LOWER_BOUND * LOG2_E) * sigmoid(slope * x)
        elif QUICK:
            log2_decay = _quick_log2_decay(raw, A_log)
        else:
            log2_decay = LOG2_E * compute_log_decay(raw, A_log, None)
    else:
        log2_decay = LOG2_E * raw
    log2_decay = tl.maximum(log2_decay, FORGOTTEN, propagate_nan=tl.PropagateNan.ALL)
    if not QUICK:
        log2_decay = tl.where(row < tokens, log2_decay, 0.0)
    if K < BK:
        log2_decay = tl.where(channel < K, log2_decay, 0.0)
    return log2_decay


@triton.jit
def _sum_gates(
    g, A_log, dt_bias, factors, decayed_rows, channel_decays, first_token, tokens, chunk_head,
    G_STRIDES: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, QUICK: tl.constexpr,
):  # fmt: skip
    """Write the sums, e^gamma and FARTHEST of a chunk. QUICK: it has C tokens, and A_log is at most
    MODEST."""
    HALF: tl.constexpr = C // 2
    log2_decay = _load_log2_decays(
        g, A_log, dt_bias, first_token, tokens, chunk_head % HV, G_STRIDES, K, BK, C, FUSED_GATE,
        LOWER_BOUND, QUICK,
    )  # fmt: skip
    G = tl.cumsum(log2_decay, axis=1)
    channel = tl.arange(0, BK)
    entries = sum_entries(
        decayed_rows, chunk_head, _rows_by_halves(C), channel[None, None, :], BK, C
    )
    tl.store(entries, G)
    first, middle = _select_token(G, 0, HALF), _select_token(G, HALF // 2 - 1, HALF)
    last = _select_token(G, HALF - 1, HALF)
    tl.store(channel_decays + chunk_head * BK + channel, exp2_flushed(tl.sum(last, axis=0)))
    farthest = tl.max(tl.maximum(first - middle, middle - last), axis=0)
    tl.store(factors + (chunk_head * NUM_FACTORS + FARTHEST) * C, tl.max(farthest, axis=0))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def sum_gates_kernel(
    g, A_log, dt_bias, factors, decayed_rows, channel_decays, cu_seqlens,
    N, T, chunks_per_sequence,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
    FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, G_STRIDES: tl.constexpr,
):  # fmt: skip
    chunk_head = tl.program_id(0).to(tl.int64)
    first_token, tokens = locate_chunk(
        chunk_head // HV, cu_seqlens, N, T, chunks_per_sequence, VARLEN, C
    )
    if tokens <= 0:
        return
    g = _hide_alignment(find_batch_row(g, first_token, T, G_STRIDES))
    decayed_rows = _hide_alignment(decayed_rows)
    channel_decays = _hide_alignment(channel_decays)
    quick = tokens >= C
    if FUSED_GATE and LOWER_BOUND is None:
        quick = quick & (load_A_log(A_log, chunk_head % HV) <= MODEST)
    if quick:
        _sum_gates(
            g, A_log, dt_bias, factors, decayed_rows, channel_decays, first_token, tokens,
            chunk_head, G_STRIDES, HV, K, BK, C, FUSED_GATE, LOWER_BOUND, True,
        )  # fmt: skip
    else:
        _sum_gates(
            g, A_log, dt_bias, factors, decayed_rows, channel_decays, first_token, tokens,
            chunk_head, G_STRIDES, HV, K, BK, C, FUSED_GATE, LOWER_BOUND, False,
        )  # fmt: skip
