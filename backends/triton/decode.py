"""Decode: one kernel takes the states of a pool through the step's tokens.

    S <- e^g S;  u = beta (v - S^T k);  S <- S + k u^T;  o = S^T (scale q)      for every token

With a decay per channel e^g scales the rows of S. L2 norm, gate and sigmoid are fused. A program
takes a sequence, a value head and a block of BV columns of V. It keeps that part of the state in
registers, as S^T [BV, K]. Offsets follow the pool's own layout, [V, K] or [K, V], so that loads and
stores use whole cache lines. q, k, v, g and beta are read by their strides. They are copied only if
the elements of a head, or of its channels, are not contiguous.

Reads the step's tensors, and the state of every live sequence once. A sequence is live if its slot
is in the pool and is not null_index. Writes o and the states.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gdn.backend import Plan
from gdn.problem import Step

from ..common.allocation import allocator
from .activation import EPS, compute_log_decay, load_A_log
from .launch import Stage, choose_configuration
from .tiles import compute_state_offsets, round_to


@triton.jit
def load_gate(gate, i, K: tl.constexpr, CHANNELS: tl.constexpr):
    """A head's gate in float32: a number, or its channels i, zero past K."""
    value = tl.load(gate + i, mask=i < K, other=0.0) if CHANNELS else tl.load(gate)
    return value.to(tl.float32)


@triton.jit
def decode_kernel(
    q, k, v, g, beta, state, indices, accepted, A_log, dt_bias, cu_seqlens, o,
    scale, null_index, T, slots, slot_stride,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, INDEX_COLUMNS: tl.constexpr, SPECULATIVE: tl.constexpr,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    G_STRIDES: tl.constexpr, BETA_STRIDES: tl.constexpr,
    V_FIRST: tl.constexpr, CHANNELS: tl.constexpr, L2_NORM: tl.constexpr,
    FUSED_GATE: tl.constexpr, LOWER_BOUND: tl.constexpr, FUSED_SIGMOID: tl.constexpr,
    BETA_SCALE: tl.constexpr,
):  # fmt: skip
    """indices [N, INDEX_COLUMNS] are slots of the pool. INDEX_COLUMNS is 0 without indices.

    CHANNELS: g and dt_bias have the channels of K. With SPECULATIVE, the state is read from column
    0, or from column `accepted`. The state after
    token t goes to column t + 1. Otherwise the one column is read and written.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    n, head, first_v = program // (HV * blocks), program // blocks % HV, program % blocks * BV
    batch, first_token, tokens = n, n * 0, T
    if cu_seqlens is not None:
        batch, first_token = n * 0, tl.load(cu_seqlens + n).to(tl.int64)
        tokens = (tl.load(cu_seqlens + n + 1) - first_token).to(tl.int32)
    slot, live = n, n >= 0
    if INDEX_COLUMNS > 0:
        column = n * 0
        if accepted is not None:
            column = tl.load(accepted + n).to(tl.int64)
            live = (column >= 0) & (column < INDEX_COLUMNS)
        slot = tl.load(indices + n * INDEX_COLUMNS + column, mask=live, other=0).to(tl.int64)
    live &= (slot != null_index) & (slot >= 0) & (slot < slots)

    offsets, mask = compute_state_offsets(head, first_v, K, V, BK, BV, V_FIRST)
    S_T = tl.load(state + slot * slot_stride + offsets, mask=mask & live, other=0.0).to(tl.float32)
    i, j = tl.arange(0, BK), first_v + tl.arange(0, BV)
    qk_head = head // (HV // H)
    q += batch * Q_STRIDES[0] + first_token * Q_STRIDES[1] + qk_head * Q_STRIDES[2] + i
    k += batch * K_STRIDES[0] + first_token * K_STRIDES[1] + qk_head * K_STRIDES[2] + i
    v += batch * V_STRIDES[0] + first_token * V_STRIDES[1] + head * V_STRIDES[2] + j
    g += batch * G_STRIDES[0] + first_token * G_STRIDES[1] + head * G_STRIDES[2]
    beta += batch * BETA_STRIDES[0] + first_token * BETA_STRIDES[1] + head * BETA_STRIDES[2]
    o += ((batch * T + first_token) * HV + head) * V + j
    for t in range(tokens):
        query = tl.load(q, mask=i < K, other=0.0).to(tl.float32)  # [K]
        key = tl.load(k, mask=i < K, other=0.0).to(tl.float32)  # [K]
        value = tl.load(v, mask=j < V, other=0.0).to(tl.float32)  # [BV]
        log_decay, strength = load_gate(g, i, K, CHANNELS), tl.load(beta).to(tl.float32)
        if L2_NORM:
            query *= tl.rsqrt(tl.sum(query * query) + EPS)
            key *= tl.rsqrt(tl.sum(key * key) + EPS)
        if FUSED_GATE:
            if dt_bias is not None:
                log_decay += load_gate(dt_bias + head * (K if CHANNELS else 1), i, K, CHANNELS)
            log_decay = compute_log_decay(log_decay, load_A_log(A_log, head), LOWER_BOUND)
        if FUSED_SIGMOID:
            strength = BETA_SCALE * tl.sigmoid(strength)
        S_T *= tl.exp(log_decay)[None, :] if CHANNELS else tl.exp(log_decay)
        u = strength * (value - tl.sum(S_T * key[None, :], axis=1))  # [BV]
        # (S + k u^T)^T q from the state before, so that this sum does not wait for u
        out = tl.sum(S_T * query[None, :], axis=1) + u * tl.sum(query * key)  # [BV]
        out = tl.where(live, scale * out, 0.0)
        S_T += u[:, None] * key[None, :]
        tl.store(o, round_to(out, o.dtype.element_ty), mask=j < V)
        if SPECULATIVE:
            stored = live & (t + 1 < INDEX_COLUMNS)
            next_slot = tl.load(indices + n * INDEX_COLUMNS + t + 1, mask=stored, other=0)
            next_slot = next_slot.to(tl.int64)
            stored &= (next_slot != null_index) & (next_slot >= 0) & (next_slot < slots)
            rounded = round_to(S_T, state.dtype.element_ty)
            tl.store(state + next_slot * slot_stride + offsets, rounded, mask=mask & stored)
        q += Q_STRIDES[1]
        k += K_STRIDES[1]
        v += V_STRIDES[1]
        g += G_STRIDES[1]
        beta += BETA_STRIDES[1]
        o += HV * V
    if not SPECULATIVE:
        rounded = round_to(S_T, state.dtype.element_ty)
        tl.store(state + slot * slot_stride + offsets, rounded, mask=mask & live & (tokens > 0))


class DecodePlan(Plan):
    """The launch for all steps of one kind: same shapes, strides, dtypes, device and options."""

    def __init__(self, step: Step) -> None:
        call, indices = step.call, step.state_indices
        (B, T, HV, V), (H, K) = call.v.shape, call.q.shape[2:]
        BK = max(16, triton.next_power_of_2(K))
        index_columns = 0 if indices is None else 1 if indices.dim() == 1 else indices.shape[1]
        constants: dict[str, Any] = {
            "H": H, "HV": HV, "K": K, "V": V, "BK": BK,
            "INDEX_COLUMNS": index_columns, "SPECULATIVE": step.speculative,
            "V_FIRST": call.state_v_first, "CHANNELS": call.per_channel,
            "L2_NORM": call.use_qk_l2norm_in_kernel, "FUSED_GATE": call.use_gate_in_kernel,
            "LOWER_BOUND": call.gate_lower_bound,
            "FUSED_SIGMOID": call.use_beta_sigmoid_in_kernel,
            "BETA_SCALE": 2.0 if call.allow_neg_eigval else 1.0,
        }  # fmt: skip
        tokens = (call.q, call.k, call.v, call.g, call.beta)
        for name, x in zip(("Q", "K", "V", "G", "BETA"), tokens, strict=True):
            constants[f"{name}_STRIDES"] = _make_rows_contiguous(x).stride()[:3]
        scans = (B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1) * HV
        configuration = choose_configuration(
            "decode_kernel", BK, step.state.element_size(), scans, 0
        )
        sizes = (step.null_index, T, step.state.shape[0], step.state.stride(0))
        self.stage = Stage(decode_kernel, scans, configuration, sizes, **constants)
        self.new_o = allocator(call.v.shape, call.v.dtype, call.v.device)
        self.needs_copies = any(_make_rows_contiguous(x) is not x for x in tokens) or any(
            x is not None and not x.is_contiguous() for x in _optional_tensors(step)
        )

    def decode(self, step: Step) -> Tensor:
        """See `gdn.backend.Plan.decode`."""
        call = step.call
        tokens: tuple[Tensor, ...] = (call.q, call.k, call.v, call.g, call.beta)
        optional = _optional_tensors(step)
        if self.needs_copies:
            tokens = tuple(map(_make_rows_contiguous, tokens))
            optional = tuple(None if x is None else x.contiguous() for x in optional)
        o = self.new_o()
        self.stage((*tokens, step.state, *optional, o), call.scale)
        return o


def _optional_tensors(step: Step) -> tuple[Tensor | None, ...]:
    """The kernel's tensors between `state` and `o`, in its order."""
    call = step.call
    return (
        step.state_indices, step.num_accepted_tokens, call.A_log, call.dt_bias, call.cu_seqlens
    )  # fmt: skip


def _make_rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy if x has a dimension of channels and they are not contiguous."""
    return x if x.dim() < 4 or x.stride(3) == 1 else x.contiguous()
