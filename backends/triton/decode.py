"""Decode: one kernel takes the states of a pool through the step's tokens.

    S <- e^g S;  u = beta (v - S^T k);  S <- S + k u^T;  o = S^T (scale q)      for every token

With a decay per channel e^g scales the rows of S. L2 norm, gate and sigmoid are fused. A program
takes a sequence, a value head and a block of BV columns of V. It keeps that part of the state in
registers, as S^T [BV, K]. Offsets follow the pool's own layout, [V, K] or [K, V], so that loads and
stores use whole cache lines. q, k, v, g and beta are read by their strides. They are copied only if
the elements of a head, or its channels, are not contiguous.

Reads the step's tensors, and the state of every live sequence once. A sequence is live if its slot
is in the pool and is not null_index. Writes o and the states.

Numbers that change while a server runs are arguments: tokens, sequences, slots, columns, strides.
So a kind of step needs three kernels: for few and for many states, and for rows that are not
aligned to 16 bytes. `gdn.warmup` compiles all three.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gdn.backend import Plan
from gdn.problem import Call, PoolCall, Step

from ..common.allocation import allocator
from .activation import EPS, compute_log_decay, load_A_log
from .indexing import load_bound
from .launch import (
    ANY_ALIGNMENT,
    Configuration,
    Stage,
    choose_configuration,
    compiles_ahead,
)
from .tiles import compute_state_offsets, round_to

COUNTS = (
    "null_index", "T", "slots", "into_slots", "index_row", "index_column", "index_columns",
    "written_row", "written_column", "written_columns", "q_row", "q_token", "q_head", "k_row",
    "k_token", "k_head", "v_row", "v_token", "v_head", "g_row", "g_token", "g_head", "beta_row",
    "beta_token", "beta_head",
)  # fmt: skip
"""Sizes and strides for whose values Triton must not compile another kernel."""
ROWS = ("q", "k", "v", "o", "written")
"""More pointers whose alignment Triton must not ask for. The kernel states it by UNIT."""


@triton.jit
def load_row(x, token, stride, UNIT: tl.constexpr, column, width, exists):
    """A row of x in float32: zero past its width, or if the token does not exist."""
    return tl.load(
        x + token * stride * UNIT + column, mask=(column < width) & exists, other=0.0
    ).to(tl.float32)


@triton.jit
def load_number(x, token, stride, exists):
    """A number of x in float32; zero if the token does not exist."""
    return tl.load(x + token * stride, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_gate(x, token, stride, channel, K: tl.constexpr, exists, CHANNELS: tl.constexpr):
    """A gate in float32: a number, or with CHANNELS its channels."""
    if CHANNELS:
        gate = load_row(x, token, stride, 1, channel, K, exists)
    else:
        gate = load_number(x, token, stride, exists)
    return gate


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANY_ALIGNMENT + ROWS)
def decode_kernel(
    q, k, v, g, beta, state, indices, accepted, into, written, A_log, dt_bias, cu_seqlens, o,
    scale, null_index, T, slots, slot_stride, into_slots, into_stride,
    index_row, index_column, index_columns, written_row, written_column, written_columns,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    g_row, g_token, g_head, beta_row, beta_token, beta_head,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SPECULATIVE: tl.constexpr, LEADING: tl.constexpr,
    FIRST_COLUMN: tl.constexpr, UNIT: tl.constexpr, CLEAR_TAIL: tl.constexpr,
    V_FIRST: tl.constexpr, CHANNELS: tl.constexpr, L2_NORM: tl.constexpr,
    FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, FUSED_SIGMOID: tl.constexpr,
    BETA_SCALE: tl.constexpr,
):  # fmt: skip
    """indices [N] or [N, index_columns]: the slot to read from, in column 0 or the one that
    `accepted` picks; None without indices. into: the pool to write, which may be `state`.

    With SPECULATIVE, written is [N, written_columns], and the state after token t goes to column
    t + FIRST_COLUMN. Otherwise the last state goes to slot written [N], or back to its own slot if
    written is None. Strides of q, k and v count UNIT elements; if UNIT is not 1, these are 16 bytes
    and rows are aligned to them. CLEAR_TAIL: tokens past the last sequence get zeros. CHANNELS: g
    and dt_bias have the channels of K.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    n, head, first_v = program // (HV * blocks), program // blocks % HV, program % blocks * BV
    batch, first_token, tokens = n, n * 0, T
    if cu_seqlens is not None:
        batch, first_token = n * 0, load_bound(cu_seqlens, n, T)
        tokens = (load_bound(cu_seqlens, n + 1, T) - first_token).to(tl.int32)
    slot, live = n, n >= 0
    if indices is not None:
        column = n * 0
        if accepted is not None:
            column = tl.load(accepted + n).to(tl.int64) - (0 if LEADING else 1)
        live = (column >= 0) & (column < index_columns)
        place = indices + n * index_row + column * index_column
        slot = tl.load(place, mask=live, other=0).to(tl.int64)
    live &= (slot != null_index) & (slot >= 0) & (slot < slots)

    # === the first token, and the state: loads that wait for one another only at the end ===
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    width = V - first_v
    qk_head = head // (HV // H)
    q += (batch * q_row + first_token * q_token + qk_head * q_head) * UNIT
    k += (batch * k_row + first_token * k_token + qk_head * k_head) * UNIT
    v += (batch * v_row + first_token * v_token + head * v_head) * UNIT
    if UNIT > 1:  # what Triton would find out itself, at the price of more kernels
        q, k, v = tl.multiple_of(q, 16), tl.multiple_of(k, 16), tl.multiple_of(v, 16)
    g += batch * g_row + first_token * g_token + head * g_head
    beta += batch * beta_row + first_token * beta_token + head * beta_head
    o += ((batch * T + first_token) * HV + head) * V + first_v
    query = load_row(q, 0, q_token, UNIT, i, K, tokens > 0)  # [K]
    key = load_row(k, 0, k_token, UNIT, i, K, tokens > 0)  # [K]
    value = load_row(v, 0, v_token, UNIT, first_v + j, V, tokens > 0)  # [BV]
    log_decay = load_gate(g, 0, g_token, i, K, tokens > 0, CHANNELS)
    strength = load_number(beta, 0, beta_token, tokens > 0)
    offsets, mask = compute_state_offsets(head, first_v, K, V, BK, BV, V_FIRST)
    S_T = tl.load(state + slot * slot_stride + offsets, mask=mask & live, other=0.0).to(tl.float32)
    for t in range(tokens):
        if L2_NORM:
            query *= tl.rsqrt(tl.sum(query * query) + EPS)
            key *= tl.rsqrt(tl.sum(key * key) + EPS)
        if FUSED_GATE:
            if dt_bias is not None:
                log_decay += load_gate(dt_bias, head, K if CHANNELS else 1, i, K, True, CHANNELS)
            log_decay = compute_log_decay(log_decay, load_A_log(A_log, head), LOWER_BOUND)
        if FUSED_SIGMOID:
            strength = BETA_SCALE * tl.sigmoid(strength)
        S_T *= tl.exp(log_decay)[None, :] if CHANNELS else tl.exp(log_decay)
        u = strength * (value - tl.sum(S_T * key[None, :], axis=1))  # [BV]
        # (S + k u^T)^T q from the state before, so that this sum does not wait for u
        out = tl.sum(S_T * query[None, :], axis=1) + u * tl.sum(query * key)  # [BV]
        out = tl.where(live, scale * out, 0.0)
        S_T += u[:, None] * key[None, :]
        tl.store(o + j, round_to(out, o.dtype.element_ty), mask=j < width)
        if SPECULATIVE:
            written_to = written + n * written_row + (t + FIRST_COLUMN) * written_column
            stored = live & (t + FIRST_COLUMN < written_columns)
            to = tl.load(written_to, mask=stored, other=0)
            to = to.to(tl.int64)
            stored &= (to != null_index) & (to >= 0) & (to < into_slots)
            rounded = round_to(S_T, into.dtype.element_ty)
            tl.store(into + to * into_stride + offsets, rounded, mask=mask & stored)
        more = t + 1 < tokens
        query = load_row(q, t + 1, q_token, UNIT, i, K, more)
        key = load_row(k, t + 1, k_token, UNIT, i, K, more)
        value = load_row(v, t + 1, v_token, UNIT, first_v + j, V, more)
        log_decay = load_gate(g, t + 1, g_token, i, K, more, CHANNELS)
        strength = load_number(beta, t + 1, beta_token, more)
        o += HV * V
    if not SPECULATIVE:
        to, stored = slot, live & (tokens > 0)
        if written is not None:
            to = tl.load(written + n * written_row).to(tl.int64)
            stored &= (to != null_index) & (to >= 0) & (to < into_slots)
        rounded = round_to(S_T, into.dtype.element_ty)
        tl.store(into + to * into_stride + offsets, rounded, mask=mask & stored)
    if CLEAR_TAIL:  # each sequence a share of the tokens
        N = (tl.num_programs(0) // (HV * blocks)).to(tl.int64)
        o -= (tl.maximum(tokens, 0) + first_token) * (HV * V)
        for token in range(load_bound(cu_seqlens, N, T) + n, T, N):
            zeros = tl.zeros([BV], o.dtype.element_ty)
            tl.store(o + token * (HV * V) + j, zeros, mask=j < width)


class DecodePlan(Plan):
    """The launches for all steps of one kind: same shapes, strides, dtypes, device and options."""

    def __init__(self, step: Step) -> None:
        call = step.call
        (B, T, HV, V), (H, K) = call.v.shape, call.q.shape[2:]
        BK = max(16, triton.next_power_of_2(K))
        clear_tail = call.cu_seqlens is not None and step.out is None
        constants: dict[str, Any] = {
            "H": H, "HV": HV, "K": K, "V": V, "BK": BK, "SPECULATIVE": step.speculative,
            "LEADING": step.leading_column, "FIRST_COLUMN": step.first_column,
            "CLEAR_TAIL": clear_tail, "V_FIRST": call.state_v_first,
            "CHANNELS": call.per_channel, "L2_NORM": call.use_qk_l2norm_in_kernel,
            "FUSED_GATE": call.use_gate_in_kernel, "LOWER_BOUND": call.gate_lower_bound,
            "FUSED_SIGMOID": call.use_beta_sigmoid_in_kernel,
            "BETA_SCALE": 2.0 if call.allow_neg_eigval else 1.0,
        }  # fmt: skip
        tokens = tuple(map(_make_rows_contiguous, (call.q, call.k, call.v, call.g, call.beta)))
        into = step.state if step.output_states is None else step.output_states
        self.has_table = step.speculative or step.output_states is not None
        sizes = (
            step.null_index, T, step.state.shape[0], step.state.stride(0), into.shape[0],
            into.stride(0), *_table(step.state_indices), *_table(step.written_table),
        )  # fmt: skip
        unit = 16 // call.q.element_size()
        strides = [stride for x in tokens[:3] for stride in x.stride()[:3]]
        gates = [stride for x in tokens[3:] for stride in x.stride()[:3]]
        self.strides_aligned = all(stride % unit == 0 for stride in (*strides, V))
        scans = (B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1) * HV
        size = step.state.element_size()
        few, many = (choose_configuration("decode_kernel", BK, size, n, 0) for n in (1, 1 << 20))
        chosen = many
        if not call.batch_invariant:  # else the order of sums over K must not depend on the batch
            chosen = choose_configuration("decode_kernel", BK, size, scans, 0)

        def stage(configuration: Configuration, unit: int) -> Stage:
            every = (*sizes, *(stride // unit for stride in strides), *gates)
            return Stage(decode_kernel, scans, configuration, every, UNIT=unit, **constants)

        self.stages = {True: stage(chosen, unit), False: stage(many, 1)}
        self.other_counts = stage(few if chosen == many else many, unit)
        self.new_o = allocator(call.v.shape, call.v.dtype, call.v.device)
        self.needs_copies = any(
            not x.is_contiguous()
            for x in (step.num_accepted_tokens, call.A_log, call.dt_bias, call.cu_seqlens)
            if x is not None
        ) or any(_make_rows_contiguous(x) is not x for x in (call.q, call.k, call.v, call.g))

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        """See `gdn.backend.Plan.precompile`."""
        if not compiles_ahead():
            return False
        assert isinstance(call, Step)
        for stage in (*self.stages.values(), self.other_counts):
            stage.compile(self.arguments(call), call.call.scale)
        return True

    def decode(self, step: Step) -> Tensor:
        """See `gdn.backend.Plan.decode`."""
        arguments = self.arguments(step)
        q, k, v, *_ = arguments
        o: Tensor = arguments[-1]
        bits = q.data_ptr() | k.data_ptr() | v.data_ptr() | o.data_ptr()
        self.stages[self.strides_aligned and not bits % 16](arguments, step.call.scale)
        return o

    def arguments(self, step: Step) -> tuple[Any, ...]:
        """The tensors that the kernel takes. The last one is o."""
        call, into = step.call, step.state
        if step.output_states is not None:
            into = step.output_states
        q, k, v, g = call.q, call.k, call.v, call.g
        accepted, A_log, dt_bias, cu_seqlens = (
            step.num_accepted_tokens, call.A_log, call.dt_bias, call.cu_seqlens
        )  # fmt: skip
        if self.needs_copies:
            q, k, v, g = map(_make_rows_contiguous, (q, k, v, g))
            accepted, A_log, dt_bias, cu_seqlens = (
                None if x is None else x.contiguous()
                for x in (accepted, A_log, dt_bias, cu_seqlens)
            )
        o = self.new_o() if step.out is None else step.out
        written = step.written_table if self.has_table else None
        return (
            q, k, v, g, call.beta, step.state, step.state_indices, accepted, into, written,
            A_log, dt_bias, cu_seqlens, o,
        )  # fmt: skip


def _table(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of a table's rows and columns, and the number of its columns."""
    if x is None:
        return 0, 0, 1
    return (x.stride(0), x.stride(1), x.shape[1]) if x.dim() == 2 else (x.stride(0), 0, 1)


def _make_rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy if x has the elements or channels of heads and they are not contiguous."""
    return x if x.dim() < 4 or x.stride(3) == 1 else x.contiguous()
