"""The op on one rank's tokens, with states exchanged between ranks: forward and backward.

Forward: each part says what leaves at its right edge. It is (N | 0), the state from its own initial
    state, if the last sequence begins in the part, and (N | M) if the part lies inside the
    sequence. One all-gather; S <- M S + N over the parts from the begin of the sequence on, in
    order; then the op, from that S.
Backward: the same from the right. A part whose first sequence began earlier says (M^T, N'), where
    M is forward's. One all-gather of N'; dS <- M^T dS + N' from the part where the sequence ends,
    in reverse order; then the op's backward, with that dS at its right edge.
States are merged in float64, which no setting of matrix products changes, and rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn import calls, dispatch
from gdn.backend import Gradients
from gdn.context_parallel import ContextParallel, all_gather, all_reduce
from gdn.problem import CALL_TENSORS, DIFFERENTIABLE, Call
from gdn.token_split import Part, Split
from gdn.validation import check_types, refuse_tangents, refuse_transforms, validate

from .summary import final_state, initial_gradient, summary


class _Local(NamedTuple):
    """The op's own result on the rank's tokens, and what backward needs of the exchange: the M of
    the parts in `Part.after`, [parts, HV, K, K] for each part of the rank."""

    o: Tensor
    states: Tensor
    call: Call
    saved: list[Tensor]
    transfers: list[Tensor]


def run(call: Call, cp: ContextParallel, request: str) -> tuple[Tensor, Tensor | None]:
    """o of this rank's tokens, and the final states of all sequences if call.output_final_state.

    The call's initial_state is that of all sequences. See `gdn.gated_delta_net`.
    """
    check_types(call)
    if not torch.compiler.is_compiling():
        refuse_transforms()
        refuse_tangents(call)
    _check(call, cp)
    split = cp.for_tokens(call.q)
    _check_state(call, split)
    save = calls.needs_grad(call)
    pinned = dispatch.resolve_context_parallel(request, _cut(call, cp, split), save)
    options = (cp, split, pinned, call[CALL_TENSORS:])
    if save:
        o, states = _ContextParallel.apply(options, *call[:CALL_TENSORS])  # type: ignore[no-untyped-call]
    else:
        local = _forward(call, cp, split, pinned, False)
        o, states = local.o, _final_state(call, cp, split, local.states)
    return o, states if call.output_final_state else None


def _check(call: Call, cp: object) -> None:
    """The errors that need no exchange."""
    if not isinstance(cp, ContextParallel):
        raise TypeError(f"cp must be a gdn.ContextParallel, got {type(cp).__name__}")
    for name in ("cu_seqlens", "cu_seqlens_cpu", "chunk_indices"):
        if getattr(call, name) is not None:
            raise ValueError(
                f"{name} must come without cp, got both; give the global cu_seqlens to "
                "gdn.ContextParallel"
            )
    validate(call._replace(initial_state=None))
    if call.q.shape[0] != 1:
        raise ValueError(
            f"q must have B = 1 with cp, got B = {call.q.shape[0]}; pack the sequences along T, "
            "and give their global cu_seqlens to gdn.ContextParallel"
        )


def _check_state(call: Call, split: Split) -> None:
    """ValueError unless initial_state has a row for every sequence."""
    shape = (split.sequences, *call.state_shape[1:])
    S = call.initial_state
    if S is None:
        return
    if tuple(S.shape) != shape:
        form = "[N, HV, V, K]" if call.state_v_first else "[N, HV, K, V]"
        raise ValueError(
            f"initial_state must be {form} = {shape}, got {tuple(S.shape)}; with cp it has a row "
            "for every sequence of all ranks"
        )
    if not S.dtype.is_floating_point or S.device != call.q.device:
        raise ValueError(
            f"initial_state must be a floating-point tensor on {call.q.device}, got {S.dtype} on "
            f"{S.device}"
        )


def _cut(call: Call, cp: ContextParallel, split: Split) -> Call:
    """The call of the rank's own segments, without states."""
    call = call._replace(initial_state=None, output_final_state=True, state_v_first=False)
    if len(split.segments) == 1:
        return call
    return call._replace(
        cu_seqlens=cp.as_tensor(split.bounds, call.q.device),
        cu_seqlens_cpu=cp.as_tensor(split.bounds, torch.device("cpu")),
    )


def _segment(call: Call, split: Split, number: int) -> Call:
    """The call of one segment, without states."""
    _, start, end, _, _ = split.segments[number]
    q, k, v, g, beta = (x[:, start:end] for x in call[:5])
    return call._replace(
        q=q, k=k, v=v, g=g, beta=beta, initial_state=None, cu_seqlens=None, state_v_first=False
    )


def _k_first(call: Call, state: Tensor) -> Tensor:
    """A state [N, HV, K, V] in the compute dtype from the caller's layout, or the reverse."""
    return (state.mT if call.state_v_first else state).to(call.state_dtype)


def _fold(terms: list[Tensor], transfers: list[Tensor]) -> Tensor:
    """terms[0], then S <- M S + N over the others."""
    S = terms[0].double()
    for N, M in zip(terms[1:], transfers, strict=True):
        S = torch.baddbmm(N.double(), M.double(), S)
    return S.to(terms[0].dtype)


def _right_edge(
    call: Call, cp: ContextParallel, split: Split, part: Part, request: str, initial: Tensor | None
) -> Tensor:
    """(N | M) of the last segment of a part whose sequence goes on, [HV, K, V + K]."""
    number = part.segments[-1]
    segment = split.segments[number]
    one = _segment(call, split, number)
    if not segment.begins:
        return summary(one, request)[0]
    if initial is not None:
        one = one._replace(initial_state=initial[segment.sequence][None])
    N = final_state(one, request)[0]
    return torch.cat([N, N.new_zeros((*N.shape[:2], N.shape[1]))], -1)


@torch.no_grad()
def _forward(call: Call, cp: ContextParallel, split: Split, request: str, save: bool) -> _Local:
    _, HV, K, V = call._replace(state_v_first=False).state_shape
    initial = None if call.initial_state is None else _k_first(call, call.initial_state)
    states = call.q.new_zeros((len(split.segments), HV, K, V), dtype=call.state_dtype)
    if initial is not None and split.first:
        places = cp.as_tensor([*split.first], states.device)
        states[places] = initial[cp.as_tensor([*split.first.values()], states.device)]
    transfers = []
    if split.crossing:
        edges = states.new_zeros((len(split.parts), HV, K, V + K))
        for slot, part in enumerate(split.parts):
            if part.after:
                edges[slot] = _right_edge(call, cp, split, part, request, initial)
        gathered = all_gather(edges, cp.group)
        for part in split.parts:
            found = [gathered[cp.place(n)] for n in part.before]
            if found:
                N, M = [x[..., :V] for x in found], [x[..., V:] for x in found[1:]]
                states[part.segments[0]] = _fold(N, M)
            inside = [gathered[cp.place(n)][..., V:] for n in part.after[1:]]
            transfers.append(torch.stack(inside) if inside else states.new_empty((0, HV, K, K)))
    local = _cut(call, cp, split)
    if initial is not None or any(part.before for part in split.parts):
        local = local._replace(initial_state=states)
    o, finals, saved = torch.ops.gdn.forward(*local, request, save)
    return _Local(o, finals, local, saved, transfers if save else [])


def _final_state(call: Call, cp: ContextParallel, split: Split, states: Tensor) -> Tensor:
    """The final states of all sequences, the same on every rank, in the caller's layout. Empty
    unless call.output_final_state."""
    if not call.output_final_state:
        return states.new_empty(0)
    found = states.new_zeros((split.sequences, *states.shape[1:]))
    if split.last:
        rows = states[cp.as_tensor([*split.last], states.device)]
        found[cp.as_tensor([*split.last.values()], states.device)] = rows
    if split.empty and call.initial_state is not None:
        rows = cp.as_tensor(split.empty, states.device)
        found[rows] = _k_first(call, call.initial_state)[rows]
    found = all_reduce(found, cp.group)
    return found.mT.contiguous() if call.state_v_first else found


class _ContextParallel(torch.autograd.Function):
    """`_forward` and `_final_state` with gradients. Arguments: the options, then the tensors."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, Tensor]:
        cp, split, request, values = options
        call = Call(*tensors, *values)
        local = _forward(call, cp, split, request, True)
        ctx.options = (*options, len(local.saved))
        ctx.save_for_backward(*tensors, local.call.initial_state, *local.saved, *local.transfers)
        return local.o, _final_state(call, cp, split, local.states)

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor, grad_final_state: Tensor) -> tuple[Tensor | None, ...]:
        cp, split, request, values, count = ctx.options
        tensors = ctx.saved_tensors  # read once: checkpointing recomputes at every access
        call = Call(*tensors[:CALL_TENSORS], *values)
        state, *rest = tensors[CALL_TENSORS:]
        local = _cut(call, cp, split)._replace(initial_state=state)
        final: Tensor | None = None
        with torch.no_grad():  # with create_graph=True, gdn.backward refuses what follows
            if call.output_final_state:
                final = all_reduce(_k_first(call, grad_final_state), cp.group)
            dS = _left_edges(call, cp, split, request, (grad_o, final), rest[count:])
        found = torch.ops.gdn.backward(*local, request, rest[:count], grad_o, dS)
        gradients = Gradients(*found)._asdict()
        if call.initial_state is not None:
            gradients["initial_state"] = _initial_gradient(call, cp, split, found[5], final)
        needed = zip(DIFFERENTIABLE, ctx.needs_input_grad[1:], strict=False)
        kept = [gradients[name] if need else None for name, need in needed]
        return None, *kept, *[None] * (CALL_TENSORS - len(kept))


def _left_edges(
    call: Call,
    cp: ContextParallel,
    split: Split,
    request: str,
    gradients: tuple[Tensor, Tensor | None],
    transfers: list[Tensor],
) -> Tensor:
    """The gradient of the state after every segment of the rank, from those of o and of the final
    states of all sequences."""
    grad_o, final = gradients
    _, HV, K, V = call._replace(state_v_first=False).state_shape
    dS = call.q.new_zeros((len(split.segments), HV, K, V), dtype=call.state_dtype)
    if final is not None and split.last:
        places = cp.as_tensor([*split.last], dS.device)
        dS[places] = final[cp.as_tensor([*split.last.values()], dS.device)]
    if not split.crossing:
        return dS
    edges = dS.new_zeros((len(split.parts), HV, K, V))
    for slot, part in enumerate(split.parts):
        if part.before:
            number = part.segments[0]
            _, start, end, _, ends = split.segments[number]
            last = dS[number][None] if ends else None
            one = _segment(call, split, number)
            edges[slot] = initial_gradient(one, request, grad_o[:, start:end], last)[0]
    gathered = all_gather(edges, cp.group)
    for part, inside in zip(split.parts, transfers, strict=True):
        if part.after:
            found = [gathered[cp.place(n)] for n in part.after]
            dS[part.segments[-1]] = _fold(found, list(inside.mT))
    return dS


def _initial_gradient(
    call: Call, cp: ContextParallel, split: Split, dS: Tensor, final: Tensor | None
) -> Tensor:
    """The gradient of initial_state: rows of the sequences that begin on this rank, zeros
    elsewhere."""
    assert call.initial_state is not None
    shape = call._replace(state_v_first=False).state_shape[1:]
    found = call.q.new_zeros((split.sequences, *shape), dtype=call.state_dtype)
    if split.first:
        rows = cp.as_tensor([*split.first.values()], found.device)
        found[rows] = dS[cp.as_tensor([*split.first], found.device)].to(found.dtype)
    if split.empty and final is not None:
        rows = cp.as_tensor(split.empty, found.device)
        found[rows] = final[rows]
    found = found.mT if call.state_v_first else found
    return found.to(call.initial_state.dtype).contiguous()
