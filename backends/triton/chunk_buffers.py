"""The buffers in which `prepare.py` leaves each chunk's factors and matrices for later stages.

They have an entry for each chunk slot and value head, number chunk_head = slot * HV + head, padded
to C tokens. In the notation of `prepare.py`:

factors [slots, HV, NUM_FACTORS, C], float32, a row each of
    GATE_SUM           G
    BETA               beta
    U_TO_STATE         e^{gamma - G} rk, the factor of U in the state's update
    QS_TO_O            scale e^G rq, the factor of Q S in o
    RQ, RK             rq, rk, the reciprocal norms of q and k (1 if not fused)
    KS_TO_E            e^G rk, the factor of K S in V - e^G * (K S)
    GATE_SUM_RESIDUAL  what G loses when it is rounded to float32 (0 unless the call is float32)

matrices [slots, HV, NUM_MATRICES, C, C], in the call's dtype
    A_BETA             A diag(beta)
    SCORES             P
    INVERSE            A, written for backward only

With a decay per channel, `channel_prepare.py` or, in bfloat16, `channel_forward.py` writes

factors                BETA, RQ and RK as above. U_TO_STATE, QS_TO_O and KS_TO_E are the scales of
                       the rows of K_OUT, Q_IN and W. GATE_SUM and GATE_SUM_RESIDUAL are 0. In
                       bfloat16 these five are written for backward only, and before that
                       GATE_SUM has FARTHEST of `channel_sums.py`. M lies in A_BETA and INVERSE,
                       and sums of g in W and Q_IN, until those are written.

decayed_rows [slots, HV, NUM_DECAYED_ROWS, C, BK], in the call's dtype, rows over their scales,
which are 1 unless it is float16. BK is K padded with zeros.
    W                  A diag(beta) (e^G rk * K)
    Q_IN               scale e^G rq * Q
    K_OUT              e^{gamma - G} rk * K

channel_decays [slots, HV, BK], float32: e^gamma

row_scales [slots, HV, V], float32, in backward of float16 calls only: powers of two that keep
states above 65504 in range. In memory, rows of S^T and U^T are divided by them, and rows of dS^T
and R^T multiplied. They are 1 where S and U are below 2^15.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import powers_of_two, round_to, row_exponents

NUM_FACTORS = tl.constexpr(8)
GATE_SUM, BETA, U_TO_STATE, QS_TO_O = (tl.constexpr(i) for i in range(4))
RQ, RK, KS_TO_E, GATE_SUM_RESIDUAL = (tl.constexpr(i) for i in range(4, 8))
NUM_MATRICES = tl.constexpr(3)
A_BETA, SCORES, INVERSE = (tl.constexpr(i) for i in range(3))
NUM_DECAYED_ROWS = tl.constexpr(3)
W, Q_IN, K_OUT = (tl.constexpr(i) for i in range(3))


@triton.jit
def load_factor(factors, chunk_head, row: tl.constexpr, C: tl.constexpr):
    """A row [C] of `factors`."""
    return tl.load(factors + (chunk_head * NUM_FACTORS + row) * C + tl.arange(0, C))


@triton.jit
def store_factor(factors, value, chunk_head, row: tl.constexpr, C: tl.constexpr):
    """Store value [C] where `load_factor` reads."""
    tl.store(factors + (chunk_head * NUM_FACTORS + row) * C + tl.arange(0, C), value)


@triton.jit
def multiply_by_factor(
    x, factors, chunk_head, row: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """x [.., C] times a row of `factors`. With CHANNELS the row has the scales of decayed rows,
    which are 1 unless dtype is float16."""
    if CHANNELS and dtype != tl.float16:
        return x
    return load_factor(factors, chunk_head, row, C)[None, :] * x


@triton.jit
def load_decayed_rows(
    decayed_rows, chunk_head, which: tl.constexpr, C: tl.constexpr, BK: tl.constexpr
):
    """Rows number `which` of `decayed_rows`, [C, BK]."""
    return load_matrix(decayed_rows, chunk_head * NUM_DECAYED_ROWS + which, 0, C, C, BK)


@triton.jit
def load_gamma(factors, chunk_head, C: tl.constexpr):
    """gamma, the log decay over a whole chunk: the last element of G."""
    return tl.load(factors + (chunk_head * NUM_FACTORS + GATE_SUM) * C + C - 1)


@triton.jit
def load_state_decay(
    factors, channel_decays, chunk_head, C: tl.constexpr, BK: tl.constexpr, CHANNELS: tl.constexpr
):
    """e^gamma, the decay of S^T over a whole chunk: a number, or [1, BK] with CHANNELS."""
    if CHANNELS:
        decay = tl.load(channel_decays + chunk_head * BK + tl.arange(0, BK)[None, :])
    else:
        decay = tl.exp(load_gamma(factors, chunk_head, C))
    return decay


@triton.jit
def load_gate_sums(factors, chunk_head, C: tl.constexpr, dtype: tl.constexpr):
    """G [C], precise enough for differences: float64 for float32 calls, else float32."""
    G = load_factor(factors, chunk_head, GATE_SUM, C)
    if dtype == tl.float32:
        G = G.to(tl.float64) + load_factor(factors, chunk_head, GATE_SUM_RESIDUAL, C)
    return G


@triton.jit
def load_matrix(x, index, first_row, ROWS: tl.constexpr, BR: tl.constexpr, C: tl.constexpr):
    """BR rows from first_row of matrix number `index` in x [.., ROWS, C]; zero past ROWS."""
    r, c = first_row + tl.arange(0, BR)[:, None], tl.arange(0, C)[None, :]
    pointers = x + index * (ROWS * C) + (r * C + c)
    if ROWS % BR == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(r < ROWS) & (c >= 0), other=0.0)


@triton.jit
def store_matrix(x, value, index, first_row, ROWS: tl.constexpr, BR: tl.constexpr, C: tl.constexpr):
    """Store value [BR, C] where `load_matrix` reads, rounded to x's dtype."""
    r, c = first_row + tl.arange(0, BR)[:, None], tl.arange(0, C)[None, :]
    pointers = x + index * (ROWS * C) + (r * C + c)
    tl.store(pointers, round_to(value, x.dtype.element_ty), mask=(r < ROWS) & (c >= 0))


@triton.jit
def store_inverse(matrices, A, A_beta, chunk_head, C: tl.constexpr, SAVE: tl.constexpr):
    """Store A_BETA and, with SAVE, INVERSE."""
    store_matrix(matrices, A_beta, chunk_head * NUM_MATRICES + A_BETA, 0, C, C, C)
    if SAVE:
        store_matrix(matrices, A, chunk_head * NUM_MATRICES + INVERSE, 0, C, C, C)


@triton.jit
def clear_saved(factors, matrices, chunk_head, C: tl.constexpr):
    """Zero what is saved of a chunk without tokens: saved tensors are outputs of a torch op, which
    must not hold uninitialised data."""
    for row in tl.static_range(NUM_FACTORS):
        store_factor(factors, tl.zeros([C], tl.float32), chunk_head, row, C)
    for which in tl.static_range(NUM_MATRICES):
        zeros = tl.zeros([C, C], tl.float32)
        store_matrix(matrices, zeros, chunk_head * NUM_MATRICES + which, 0, C, C, C)


@triton.jit
def store_row_scales(
    row_scales, S_T, U_T, chunk_head, first_v, V: tl.constexpr, BV: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Store the scales of the rows of S^T and U^T from first_v. Return their reciprocals [BV, 1],
    or 1 unless dtype is float16."""
    if dtype == tl.float16:
        exponents = tl.maximum(row_exponents(S_T), row_exponents(U_T)) - 14
        scales, reciprocals = powers_of_two(tl.maximum(exponents, 127))
        v = first_v + tl.arange(0, BV)[:, None]
        tl.store(row_scales + chunk_head * V + v, scales, mask=v < V)
    else:
        reciprocals = 1.0
    return reciprocals


@triton.jit
def load_row_scales(
    row_scales, chunk_head, first_v, V: tl.constexpr, BV: tl.constexpr, dtype: tl.constexpr
):
    """What `store_row_scales` stores, [BV]; ones unless dtype is float16."""
    v = first_v + tl.arange(0, BV)
    if dtype == tl.float16:
        scales = tl.load(row_scales + chunk_head * V + v, mask=v < V, other=1.0)
    else:
        scales = tl.full([BV], 1.0, tl.float32)
    return scales


@triton.jit
def multiply_by_scales(x, row_scales, chunk_head, first_v, V: tl.constexpr, BV: tl.constexpr):
    """x [.., BV], the left factor in a product with S^T or U^T from memory, times their scales."""
    if x.dtype == tl.float16:
        scales = load_row_scales(row_scales, chunk_head, first_v, V, BV, tl.float16)
        x = (x.to(tl.float32) * scales[None, :]).to(tl.float16)
    return x
