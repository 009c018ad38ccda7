"""The walk over the chunks, forward and backward: one Python loop, all sequences and heads in step.

Backward keeps the state before every chunk, [rows, H, K, G V] in the compute dtype, and computes
the rest again. Compute dtype is float32 (float64 for float64 inputs). On a GPU, matrix products of
half-precision calls round their operands to the call's dtype, to run on the tensor cores; on a CPU
float32 is faster, and kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.definition import activate, gate_floor
from gdn.problem import Call

from .activation import deactivate
from .chunk import Chunk, chunk_backward, chunk_forward
from .layout import Layout, make_layout, max_rows


def saved_like(call: Call) -> list[Tensor]:
    """The state before every chunk."""
    _, HV, K, V = call._replace(state_v_first=False).state_shape
    H = call.q.shape[2]
    return [call.q.new_empty((max_rows(call), H, K, HV // H * V), dtype=call.state_dtype)]


def _operands(call: Call, chosen: torch.dtype | None) -> torch.dtype:
    if chosen is not None:
        return chosen
    return call.q.dtype if call.q.device.type == "cuda" else call.state_dtype


def _heads(x: Tensor, H: int, dtype: torch.dtype) -> Tensor:
    """[m, C, heads, D] -> [m, H, C, heads D / H] in dtype."""
    return x.reshape(*x.shape[:2], H, -1).transpose(1, 2).to(dtype).contiguous()


def _gates(x: Tensor, H: int) -> Tensor:
    """[m, C, HV] -> [m, H, G, C]."""
    return x.reshape(*x.shape[:2], H, -1).permute(0, 2, 3, 1).contiguous()


def _tokens(x: Tensor, heads: int) -> Tensor:
    """[m, H, C, heads D / H] -> [m, C, heads, D]."""
    m, _, C, _ = x.shape
    return x.transpose(1, 2).reshape(m, C, heads, -1)


def _gather(call: Call, layout: Layout, n: int) -> Call:
    """The call's q, k, v, g, beta, cut to chunk n: [m, C, ...]."""
    q, k, v, g, beta = (layout.take(x, n) for x in call[:5])
    return call._replace(q=q, k=k, v=v, g=g, beta=beta)


def _prepare(call: Call, layout: Layout, n: int, operands: torch.dtype) -> Chunk:
    """Chunk n, activated and laid out by q/k head, with the tokens past a sequence's end made
    inert."""
    part, H, dtype = _gather(call, layout, n), call.q.shape[2], call.state_dtype
    q, k, g, beta = activate(part, dtype)
    g, beta = layout.blank(g.clamp(min=gate_floor(dtype)), n), layout.blank(beta, n)
    return Chunk(
        _heads(q, H, dtype),
        _heads(k, H, dtype),
        _heads(part.v, H, dtype),
        _gates(g, H),
        _gates(beta, H),
        call.scale,
        operands,
    )


def _join_state(call: Call, state: Tensor | None) -> Tensor:
    """A state in the caller's layout, or None for zero -> [N, H, K, G V] in the compute dtype, a
    copy."""
    N, HV, K, V = call._replace(state_v_first=False).state_shape
    H = call.q.shape[2]
    if state is None:
        return call.q.new_zeros((N, H, K, HV // H * V), dtype=call.state_dtype)
    state = state.mT if call.state_v_first else state
    joined = state.new_empty((N, H, K, HV // H, V), dtype=call.state_dtype)
    joined.copy_(state.reshape(N, H, HV // H, K, V).transpose(2, 3))
    return joined.flatten(3)


def _split_state(call: Call, state: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, H, K, G V] -> the caller's layout in dtype."""
    N, H, K, _ = state.shape
    state = state.view(N, H, K, -1, call.v.shape[3]).transpose(2, 3).flatten(1, 2)
    return (state.mT if call.state_v_first else state).to(dtype).contiguous()


def forward(call: Call, save: bool, operands: torch.dtype | None = None) -> Forward:
    """See `gdn.backend.Backend.forward`, and `TorchBackend` for operands."""
    layout, operands = make_layout(call), _operands(call, operands)
    S = layout.sort(_join_state(call, call.initial_state))
    o = call.v.new_empty(call.v.shape)
    saved = saved_like(call) if save else []
    row = 0
    for n, m in enumerate(layout.active):
        before = S[:m]
        if save:
            saved[0][row : row + m] = before
            row += m
        out, after = chunk_forward(_prepare(call, layout, n, operands), before)
        layout.put(o, n, _tokens(out, call.v.shape[2]))
        S = after if m == len(S) else torch.cat([after, S[m:]])
    for states in saved:
        states[row:] = 0  # rows that short sequences left over: outputs of an op are never junk
    final_state = None
    if call.output_final_state:
        final_state = _split_state(call, layout.unsort(S), call.state_dtype)
    return Forward(o, final_state, saved)


def backward(
    call: Call,
    saved: list[Tensor],
    grad_o: Tensor,
    grad_final_state: Tensor | None,
    operands: torch.dtype | None = None,
) -> Gradients:
    """See `gdn.backend.Backend.backward`, and `TorchBackend` for operands."""
    layout, operands = make_layout(call), _operands(call, operands)
    H = call.q.shape[2]
    dS = layout.sort(_join_state(call, grad_final_state))
    dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in call[:5])
    sums = [
        None if x is None else x.new_zeros(x.shape, dtype=call.state_dtype)
        for x in (call.A_log, call.dt_bias)
    ]
    row = layout.row(len(layout.active))
    for n in reversed(range(len(layout.active))):
        m = layout.active[n]
        row -= m
        chunk = _prepare(call, layout, n, operands)
        do = _heads(layout.take(grad_o, n), H, call.state_dtype)
        d = chunk_backward(chunk, saved[0][row : row + m], do, dS[:m])
        dS = d.state if m == len(dS) else torch.cat([d.state, dS[m:]])
        raw = deactivate(
            _gather(call, layout, n),
            _tokens(d.q, H),
            _tokens(d.k, H),
            layout.blank(d.g.flatten(1, 2).mT, n),  # tokens past the end stay out of dA_log
            d.beta.flatten(1, 2).mT,
        )
        for out, value in zip((dq, dk, dg, dbeta), raw[:4], strict=True):
            layout.put(out, n, value)
        layout.put(dv, n, _tokens(d.v, call.v.shape[2]))
        for total, term in zip(sums, raw[4:], strict=True):
            if total is not None and term is not None:
                total += term
    dS0 = None
    if call.initial_state is not None:
        dS0 = _split_state(call, layout.unsort(dS), call.initial_state.dtype)
    parameters = (
        None if x is None or total is None else total.to(x.dtype)
        for x, total in zip((call.A_log, call.dt_bias), sums, strict=True)
    )
    return Gradients(dq, dk, dv, dg, dbeta, dS0, *parameters)
