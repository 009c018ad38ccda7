"""The loop over the chunks, forward and backward. Each step computes a chunk of all sequences.

Forward saves the state before every chunk, [rows, H, K, group V]. Backward computes everything else
again. The compute dtype is float32, or float64 for float64 inputs. On a GPU, matrix products of
half-precision calls round their operands to the call's dtype, so that they run on tensor cores. On
a CPU float32 operands are faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.definition import activate, gate_floor
from gdn.problem import CHUNK, Call

from . import channel_chunk, chunk
from .activation import backpropagate_activation
from .chunk import Chunk
from .layout import Layout, make_layout, max_rows


def saved_like(call: Call) -> list[Tensor]:
    """An empty tensor for the state before every chunk."""
    _, HV, K, V = call._replace(state_v_first=False).state_shape
    H = call.q.shape[2]
    return [call.q.new_empty((max_rows(call), H, K, HV // H * V), dtype=call.state_dtype)]


def _choose_operand_dtype(call: Call, override: torch.dtype | None) -> torch.dtype:
    if override is not None:
        return override
    return call.q.dtype if call.q.device.type == "cuda" else call.state_dtype


def _split_heads(x: Tensor, H: int, dtype: torch.dtype) -> Tensor:
    """[m, C, H, K] -> [m, H, C, K], or [m, C, HV, V] -> [m, H, C, group V], in dtype."""
    return x.reshape(*x.shape[:2], H, -1).transpose(1, 2).to(dtype).contiguous()


def _split_gates(x: Tensor, H: int) -> Tensor:
    """[m, C, HV, ...] -> [m, H, group, C, ...]."""
    return x.reshape(*x.shape[:2], H, -1, *x.shape[3:]).movedim(1, 3).contiguous()


def _join_gates(x: Tensor) -> Tensor:
    """The inverse of `_split_gates`."""
    return x.movedim(3, 1).flatten(2, 3)


def _join_heads(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_split_heads`: [m, H, C, ...] -> [m, C, heads, ...]."""
    m, _, C, _ = x.shape
    return x.transpose(1, 2).reshape(m, C, heads, -1)


def _gather_chunk(call: Call, layout: Layout, n: int) -> Call:
    """The call with q, k, v, g and beta of chunk n alone, [m, C, ...]."""
    q, k, v, g, beta = (layout.gather(x, n) for x in call[:5])
    return call._replace(q=q, k=k, v=v, g=g, beta=beta)


def _prepare_chunk(
    call: Call, layout: Layout, n: int, operand_dtype: torch.dtype, rounds_inverse: bool
) -> Chunk:
    """Chunk n with the fused options applied, heads split, and g and beta zero past the end of a
    sequence, so that padding does not change the state."""
    raw, H, dtype = _gather_chunk(call, layout, n), call.q.shape[2], call.state_dtype
    q, k, g, beta = activate(raw, dtype)
    g = layout.zero_padding(g.clamp(min=gate_floor(dtype)), n)
    beta = layout.zero_padding(beta, n)
    return Chunk(
        _split_heads(q, H, dtype),
        _split_heads(k, H, dtype),
        _split_heads(raw.v, H, dtype),
        _split_gates(g, H),
        _split_gates(beta, H),
        call.scale,
        operand_dtype,
        rounds_inverse,
    )


def _join_state(call: Call, state: Tensor | None) -> Tensor:
    """[N, H, K, group V] in the compute dtype, a copy of a state in the caller's layout. None is
    zero."""
    N, HV, K, V = call._replace(state_v_first=False).state_shape
    H = call.q.shape[2]
    if state is None:
        return call.q.new_zeros((N, H, K, HV // H * V), dtype=call.state_dtype)
    state = state.mT if call.state_v_first else state
    joined = state.new_empty((N, H, K, HV // H, V), dtype=call.state_dtype)
    joined.copy_(state.reshape(N, H, HV // H, K, V).transpose(2, 3))
    return joined.flatten(3)


def _split_state(call: Call, state: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_join_state`: a state in the caller's layout, in dtype."""
    N, H, K, _ = state.shape
    state = state.view(N, H, K, -1, call.v.shape[3]).transpose(2, 3).flatten(1, 2)
    return (state.mT if call.state_v_first else state).to(dtype).contiguous()


def forward(
    call: Call,
    save: bool,
    operand_dtype: torch.dtype | None,
    rounds_inverse: bool,
    visit: Callable[[int, Callable[[], Tensor]], None] | None = None,
) -> Forward:
    """See `gdn.backend.Plan.forward`, and `TorchBackend` for the last two options.

    `visit` is called after every chunk with the number of tokens that the longest sequences have
    done, and a function that returns the states of all sequences, in the caller's order and layout.
    """
    layout, operand_dtype = make_layout(call), _choose_operand_dtype(call, operand_dtype)
    compute = channel_chunk if call.per_channel else chunk
    S = layout.sort(_join_state(call, call.initial_state))
    o = call.v.new_empty(call.v.shape)
    saved = saved_like(call) if save else []
    row = 0
    for n, m in enumerate(layout.active):
        before = S[:m]
        if save:
            saved[0][row : row + m] = before
            row += m
        inputs = _prepare_chunk(call, layout, n, operand_dtype, rounds_inverse)
        o_chunk, after = compute.chunk_forward(inputs, before)
        layout.scatter(o, n, _join_heads(o_chunk, call.v.shape[2]))
        S = after if m == len(S) else torch.cat([after, S[m:]])
        if visit is not None:
            visit((n + 1) * CHUNK, lambda S=S: _split_state(call, layout.unsort(S), S.dtype))  # type: ignore[misc]
    layout.zero_tail(o)
    for states in saved:
        states[row:] = 0  # rows may be unused, and outputs of an op must be defined
    final_state = None
    if call.output_final_state:
        final_state = _split_state(call, layout.unsort(S), call.state_dtype)
    return Forward(o, final_state, saved)


def backward(
    call: Call,
    saved: list[Tensor],
    grad_o: Tensor,
    grad_final_state: Tensor | None,
    operand_dtype: torch.dtype | None,
    rounds_inverse: bool,
) -> Gradients:
    """See `gdn.backend.Plan.backward`, and `TorchBackend` for the last two."""
    layout, operand_dtype = make_layout(call), _choose_operand_dtype(call, operand_dtype)
    H, compute = call.q.shape[2], channel_chunk if call.per_channel else chunk
    dS = layout.sort(_join_state(call, grad_final_state))
    dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in call[:5])
    parameter_gradients = [  # of A_log and dt_bias, summed over the chunks
        None if x is None else x.new_zeros(x.shape, dtype=call.state_dtype)
        for x in (call.A_log, call.dt_bias)
    ]
    row = layout.count_rows(len(layout.active))
    for n in reversed(range(len(layout.active))):
        m = layout.active[n]
        row -= m
        inputs = _prepare_chunk(call, layout, n, operand_dtype, rounds_inverse)
        do_chunk = _split_heads(layout.gather(grad_o, n), H, call.state_dtype)
        gradients = compute.chunk_backward(inputs, saved[0][row : row + m], do_chunk, dS[:m])
        dS = gradients.state if m == len(dS) else torch.cat([gradients.state, dS[m:]])
        raw = backpropagate_activation(
            _gather_chunk(call, layout, n),
            _join_heads(gradients.q, H),
            _join_heads(gradients.k, H),
            layout.zero_padding(_join_gates(gradients.g), n),  # else padding adds to dA_log
            _join_gates(gradients.beta),
        )
        for out, value in zip((dq, dk, dg, dbeta), raw[:4], strict=True):
            layout.scatter(out, n, value)
        layout.scatter(dv, n, _join_heads(gradients.v, call.v.shape[2]))
        for total, term in zip(parameter_gradients, raw[4:], strict=True):
            if total is not None and term is not None:
                total += term
    for x in (dq, dk, dv, dg, dbeta):
        layout.zero_tail(x)
    d_initial = None
    if call.initial_state is not None:
        d_initial = _split_state(call, layout.unsort(dS), call.initial_state.dtype)
    converted = (
        None if x is None or total is None else total.to(x.dtype)
        for x, total in zip((call.A_log, call.dt_bias), parameter_gradients, strict=True)
    )
    return Gradients(dq, dk, dv, dg, dbeta, d_initial, *converted)
