"""Decode: one program a sequence, value head and block of V takes its part of the state through the
step's tokens in registers.

    S <- e^g S;  u = beta (v - S^T k);  S <- S + k u^T;  o = S^T (scale q)      for every token

L2 norm, gate and sigmoid are fused. The state's [V, K] tile is walked in the pool's own layout, so
that both are read in whole cache lines; q, k, v, g and beta by their strides.

Reads the step's tensors and, once, the state of every live sequence; writes o and that state.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gdn.backend import Plan
from gdn.problem import Step

from ..common.allocation import allocator
from .launch import Stage, configuration
from .tiles import EPS, log_decay, narrow, tile_offsets


@triton.jit
def decode_kernel(
    q, k, v, g, beta, state, indices, accepted, A_log, dt_bias, cu_seqlens, o,
    scale, null_index, T, slots, slot_stride,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, COLUMNS: tl.constexpr, SPECULATIVE: tl.constexpr,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    G_STRIDES: tl.constexpr, BETA_STRIDES: tl.constexpr,
    V_FIRST: tl.constexpr, L2: tl.constexpr, GATE: tl.constexpr,
    SIGMOID: tl.constexpr, BETA_SCALE: tl.constexpr,
):  # fmt: skip
    """COLUMNS of `indices`, 0 if there are none. SPECULATIVE: column 0 is read, the state after
    token t goes to column t + 1; else the one column is read and written."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    n, head, first = program // (HV * blocks), program // blocks % HV, program % blocks * BV
    batch, start, count = n, n * 0, T
    if cu_seqlens is not None:
        batch, start = n * 0, tl.load(cu_seqlens + n).to(tl.int64)
        count = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
    slot, live = n, n >= 0
    if COLUMNS > 0:
        column = n * 0
        if accepted is not None:
            column = tl.load(accepted + n).to(tl.int64)
            live = (column >= 0) & (column < COLUMNS)
        slot = tl.load(indices + n * COLUMNS + column, mask=live, other=0).to(tl.int64)
    live &= (slot != null_index) & (slot >= 0) & (slot < slots)

    at, inside = tile_offsets(head, first, K, V, BK, BV, V_FIRST)
    S = tl.load(state + slot * slot_stride + at, mask=inside & live, other=0.0).to(tl.float32)
    i, j = tl.arange(0, BK), first + tl.arange(0, BV)
    kh = head // (HV // H)
    q += batch * Q_STRIDES[0] + start * Q_STRIDES[1] + kh * Q_STRIDES[2] + i
    k += batch * K_STRIDES[0] + start * K_STRIDES[1] + kh * K_STRIDES[2] + i
    v += batch * V_STRIDES[0] + start * V_STRIDES[1] + head * V_STRIDES[2] + j
    g += batch * G_STRIDES[0] + start * G_STRIDES[1] + head * G_STRIDES[2]
    beta += batch * BETA_STRIDES[0] + start * BETA_STRIDES[1] + head * BETA_STRIDES[2]
    o += ((batch * T + start) * HV + head) * V + j
    for t in range(count):
        query = tl.load(q, mask=i < K, other=0.0).to(tl.float32)
        key = tl.load(k, mask=i < K, other=0.0).to(tl.float32)
        value = tl.load(v, mask=j < V, other=0.0).to(tl.float32)
        decay, strength = tl.load(g).to(tl.float32), tl.load(beta).to(tl.float32)
        if L2:
            query *= tl.rsqrt(tl.sum(query * query) + EPS)
            key *= tl.rsqrt(tl.sum(key * key) + EPS)
        if GATE:
            if dt_bias is not None:
                decay += tl.load(dt_bias + head).to(tl.float32)
            decay = log_decay(decay, tl.load(A_log + head).to(tl.float32))
        if SIGMOID:
            strength = BETA_SCALE * tl.sigmoid(strength)
        S *= tl.exp(decay)
        u = strength * (value - tl.sum(S * key[None, :], axis=1))
        # (S + k u^T)^T q, from the state before, so that no sum waits for another
        read = tl.sum(S * query[None, :], axis=1) + u * tl.sum(query * key)
        read = tl.where(live, scale * read, 0.0)
        S += u[:, None] * key[None, :]
        tl.store(o, narrow(read, o.dtype.element_ty), mask=j < V)
        if SPECULATIVE:
            kept = live & (t + 1 < COLUMNS)
            to = tl.load(indices + n * COLUMNS + t + 1, mask=kept, other=0).to(tl.int64)
            kept &= (to != null_index) & (to >= 0) & (to < slots)
            S_t = narrow(S, state.dtype.element_ty)
            tl.store(state + to * slot_stride + at, S_t, mask=inside & kept)
        q += Q_STRIDES[1]
        k += K_STRIDES[1]
        v += V_STRIDES[1]
        g += G_STRIDES[1]
        beta += BETA_STRIDES[1]
        o += HV * V
    if not SPECULATIVE:
        S_T = narrow(S, state.dtype.element_ty)
        tl.store(state + slot * slot_stride + at, S_T, mask=inside & live & (count > 0))


class DecodePlan(Plan):
    """All that steps of one kind (shapes, strides, dtypes, device, options) have in common."""

    def __init__(self, step: Step) -> None:
        call, indices = step.call, step.state_indices
        (B, T, HV, V), (H, K) = call.v.shape, call.q.shape[2:]
        BK = max(16, triton.next_power_of_2(K))
        columns = 0 if indices is None else 1 if indices.dim() == 1 else indices.shape[1]
        constants: dict[str, Any] = {
            "H": H, "HV": HV, "K": K, "V": V, "BK": BK,
            "COLUMNS": columns, "SPECULATIVE": step.speculative,
            "V_FIRST": call.state_v_first, "L2": call.use_qk_l2norm_in_kernel,
            "GATE": call.use_gate_in_kernel, "SIGMOID": call.use_beta_sigmoid_in_kernel,
            "BETA_SCALE": 2.0 if call.allow_neg_eigval else 1.0,
        }  # fmt: skip
        tokens = (call.q, call.k, call.v, call.g, call.beta)
        for name, x in zip(("Q", "K", "V", "G", "BETA"), tokens, strict=True):
            constants[f"{name}_STRIDES"] = _rows(x).stride()[:3]
        walks = (B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1) * HV
        chosen = configuration("decode_kernel", BK, step.state.element_size(), walks, 0)
        sizes = (step.null_index, T, step.state.shape[0], step.state.stride(0))
        self.stage = Stage(decode_kernel, walks, chosen, sizes, **constants)
        self.new_o = allocator(call.v.shape, call.v.dtype, call.v.device)
        self.plain = all(_rows(x) is x for x in tokens) and all(
            x is None or x.is_contiguous() for x in _rest(step)
        )

    def decode(self, step: Step) -> Tensor:
        """See `gdn.backend.Plan.decode`."""
        call = step.call
        tokens: tuple[Tensor, ...] = (call.q, call.k, call.v, call.g, call.beta)
        rest = _rest(step)
        if not self.plain:
            tokens = tuple(map(_rows, tokens))
            rest = tuple(None if x is None else x.contiguous() for x in rest)
        o = self.new_o()
        self.stage((*tokens, step.state, *rest, o), call.scale)
        return o


def _rest(step: Step) -> tuple[Tensor | None, ...]:
    """The tensors that the kernel takes after the pool, before o."""
    call = step.call
    return (
        step.state_indices, step.num_accepted_tokens, call.A_log, call.dt_bias, call.cu_seqlens
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """x, or a copy in which the elements of a head lie side by side; g and beta as they are."""
    return x if x.dim() < 4 or x.stride(3) == 1 else x.contiguous()
