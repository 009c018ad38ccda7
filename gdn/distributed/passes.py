"""Forward and backward of the op on one rank's tokens, with states exchanged between ranks.

Forward: each part says what leaves at its right edge. It is (N | 0), the state from its own initial
    state, if the last sequence begins in the part, and (N | M) if the part lies inside the
    sequence. One all-gather; S <- M S + N over the parts from the begin of the sequence on, in
    order; then the op, from that S.
Backward: the same from the right. A part whose first sequence began earlier says (M^T, N'), where
    M is forward's. One all-gather of N'; dS <- M^T dS + N' from the part where the sequence ends,
    in reverse order; then the op's backward, with that dS at its right edge.
States are merged in float64, which no setting of matrix products changes, and rounded once.

Where the backend can (`Backend.exchanges`), the op itself is split at the exchange: its first scans
give the summaries, and its second ones start from the states that come (`pieces.py`). Elsewhere,
and where a part has many segments, further calls of the op give them (`summary.py`).

`request` is a pinned one (`gdn.registry.pin`); `call.initial_state` is that of all sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from gdn import dispatch
from gdn.backend import Gradients
from gdn.context_parallel import Placement, as_tensor
from gdn.exchange import ExchangingPlan, PieceMaps
from gdn.ops import surroundings
from gdn.problem import Call
from gdn.registry import find_backend
from gdn.token_split import Part

from . import pieces
from .summary import final_state, initial_gradient, summary

CPU = torch.device("cpu")


def forward(
    call: Call, at: Placement, request: str, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o of this rank's tokens; the final states of all sequences, empty unless
    call.output_final_state; and what `backward` needs, as `saved_like` has it."""
    (HV, V), K, split = call.v.shape[2:], call.q.shape[3], at.split
    initial = None if call.initial_state is None else _k_first(call, call.initial_state)
    states = call.q.new_zeros((len(split.segments), HV, K, V), dtype=call.state_dtype)
    if initial is not None:
        _copy_rows(initial, {n: row for row, n in split.first.items()}, states)
    transfers: list[Tensor] = []

    def exchange(maps: PieceMaps | None = None) -> Callable[[], Tensor]:
        """See `gdn.exchange.Exchange`; without maps further calls give the edges."""
        edges = states.new_zeros((len(split.parts), HV, K, V + K))
        for slot, part in enumerate(split.parts):
            if part.after and maps:
                edges[slot] = pieces.right_edge(maps, split, part.segments[-1], states)
            elif part.after:
                edges[slot] = _right_edge(call, at, part, request, states)
        return functools.partial(fill_states, at.start_all_gather(edges))

    def fill_states(wait: Callable[[], Tensor]) -> Tensor:
        """Fill the states that other ranks know, and `transfers`."""
        gathered = wait()
        for part in split.parts:
            found = [gathered[at.place(n)] for n in part.before]
            if found:
                N, M = [x[..., :V] for x in found], [x[..., V:] for x in found[1:]]
                states[part.segments[0]] = _fold(N, M)
            inside = [gathered[at.place(n)][..., V:] for n in part.after[1:]]
            transfers.append(torch.stack(inside) if inside else states.new_empty((0, HV, K, K)))
        return states

    local = cut(call, at, states, request)
    if local.context_parallel:
        with surroundings(call.q):
            o, finals, saved = _plan(local, request, save).forward_part(local, save, exchange)
        assert finals is not None
    else:
        exchange()()
        o, finals, saved = torch.ops.gdn.forward(*local, request, save)
    return o, _final_state(call, at, finals, initial), [states, *transfers, *saved] if save else []


def backward(
    call: Call,
    at: Placement,
    request: str,
    saved: list[Tensor],
    grad_o: Tensor,
    grad_final_state: Tensor | None,
) -> Gradients:
    """The gradients of this rank's tokens, of the rows of initial_state that it owns, and its share
    of those of A_log and dt_bias."""
    (HV, V), K, split = call.v.shape[2:], call.q.shape[3], at.split
    parts = len(split.parts)
    states, transfers, saved = saved[0], saved[1 : 1 + parts], saved[1 + parts :]
    final: Tensor | None = None
    if call.output_final_state:
        if grad_final_state is None:
            grad_final_state = call.q.new_zeros(global_shape(call, at), dtype=call.state_dtype)
        final = at.all_reduce(_k_first(call, grad_final_state))
    dS = call.q.new_zeros((len(split.segments), HV, K, V), dtype=call.state_dtype)
    if final is not None:
        _copy_rows(final, {n: row for row, n in split.last.items()}, dS)

    def exchange(maps: PieceMaps | None = None) -> Callable[[], Tensor]:
        """See `gdn.exchange.Exchange`; without maps further calls give the edges."""
        edges = dS.new_zeros((parts, HV, K, V))
        for slot, part in enumerate(split.parts):
            if part.before and maps:
                edges[slot] = pieces.left_edge(maps, split, part.segments[0], dS)
            elif part.before:
                edges[slot] = _left_edge(call, at, part, request, grad_o, dS)
        return functools.partial(fill_gradients, at.start_all_gather(edges))

    def fill_gradients(wait: Callable[[], Tensor]) -> Tensor:
        """Fill the gradients that other ranks know."""
        gathered = wait()
        for part, inside in zip(split.parts, transfers, strict=True):
            if part.after:
                found = [gathered[at.place(n)] for n in part.after]
                dS[part.segments[-1]] = _fold(found, list(inside.mT))
        return dS

    local = cut(call, at, states, request)
    if local.context_parallel:
        with surroundings(call.q):
            found = _plan(local, request, True).backward_part(local, saved, grad_o, exchange)
    else:
        found = Gradients(*torch.ops.gdn.backward(*local, request, saved, grad_o, exchange()()))
    initial = None
    if call.initial_state is not None:
        initial = _initial_gradient(call, at, found.initial_state, final)
    return found._replace(initial_state=initial)


def _plan(local: Call, request: str, save: bool) -> ExchangingPlan:
    return cast(ExchangingPlan, dispatch.choose(request, local, save).plan)


def saved_like(call: Call, at: Placement, saved: list[Tensor]) -> list[Tensor]:
    """Empty tensors with the shapes and dtypes of what `forward` saves, from those of the op: the
    state before each segment [segments, HV, K, V]; for each part M of the parts in `Part.after` but
    the first [parts, HV, K, K]; what the op saves."""
    (HV, V), K = call.v.shape[2:], call.q.shape[3]
    shapes = [(len(at.split.segments), HV, K, V)]
    shapes += [(max(0, len(part.after) - 1), HV, K, K) for part in at.split.parts]
    return [call.q.new_empty(shape, dtype=call.state_dtype) for shape in shapes] + saved


def global_shape(call: Call, at: Placement) -> tuple[int, ...]:
    """The shape of the states of all sequences."""
    return (at.split.sequences, *call.state_shape[1:])


def cut(call: Call, at: Placement, states: Tensor | None, request: str | None = None) -> Call:
    """The call of the rank's own segments, from the states before them. They may be None where
    every one is zero. With the request, `context_parallel` says whether the plan exchanges."""
    split = at.split
    bounds = None if len(split.segments) == 1 else tuple(split.bounds)
    passes_on = any(part.before or part.after for part in split.parts)
    if call.initial_state is None and not passes_on:
        states = None
    local = call._replace(
        initial_state=states,
        cu_seqlens=None if bounds is None else as_tensor(bounds, call.q.device),
        cu_seqlens_cpu=None if bounds is None else as_tensor(bounds, CPU),
        output_final_state=True,
        state_v_first=False,
    )
    # all segments are scanned for their maps: no more than the two at the edges of a part
    few = len(split.segments) <= 2 * len(split.parts)
    if request is None or not (passes_on and few):
        return local
    return local._replace(context_parallel=find_backend(request).exchanges(local))


def _segment(call: Call, at: Placement, number: int) -> Call:
    """The call of one segment, without states."""
    _, start, end, _, _ = at.split.segments[number]
    q, k, v, g, beta = (x[:, start:end] for x in call[:5])
    return call._replace(
        q=q, k=k, v=v, g=g, beta=beta, initial_state=None, cu_seqlens=None, state_v_first=False
    )


def _k_first(call: Call, state: Tensor) -> Tensor:
    """A state [N, HV, K, V] in the compute dtype from the caller's layout, or the reverse."""
    return (state.mT if call.state_v_first else state).to(call.state_dtype)


def _copy_rows(source: Tensor, rows: dict[int, int], into: Tensor) -> None:
    """into[row] = source[from] for the pairs (from, row)."""
    if rows:
        picked = source[as_tensor(tuple(rows), source.device)]
        into[as_tensor(tuple(rows.values()), into.device)] = picked.to(into.dtype)


def _fold(terms: list[Tensor], transfers: list[Tensor]) -> Tensor:
    """terms[0], then S <- M S + N over the others."""
    S = terms[0].double()
    for N, M in zip(terms[1:], transfers, strict=True):
        S = torch.baddbmm(N.double(), M.double(), S)
    return S.to(terms[0].dtype)


def _right_edge(call: Call, at: Placement, part: Part, request: str, states: Tensor) -> Tensor:
    """(N | M) of the last segment of a part whose sequence goes on, [HV, K, V + K]."""
    number = part.segments[-1]
    one = _segment(call, at, number)
    if not at.split.segments[number].begins:
        return summary(one, request)[0]
    if call.initial_state is not None:
        one = one._replace(initial_state=states[number][None])
    N = final_state(one, request)[0]
    return torch.cat([N, N.new_zeros((*N.shape[:2], N.shape[1]))], -1)


def _final_state(call: Call, at: Placement, finals: Tensor, initial: Tensor | None) -> Tensor:
    """The final states of all sequences, the same on every rank, in the caller's layout. Empty
    unless call.output_final_state."""
    if not call.output_final_state:
        return call.q.new_empty(0)
    split = at.split
    found = finals.new_zeros((split.sequences, *finals.shape[1:]))
    _copy_rows(finals, split.last, found)
    if initial is not None:
        _copy_rows(initial, {n: n for n in split.empty}, found)
    found = at.all_reduce(found)
    return found.mT.contiguous() if call.state_v_first else found


def _left_edge(
    call: Call, at: Placement, part: Part, request: str, grad_o: Tensor, dS: Tensor
) -> Tensor:
    """N' of the first segment of a part, whose sequence began earlier, [HV, K, V]."""
    number = part.segments[0]
    _, start, end, _, ends = at.split.segments[number]
    one, last = _segment(call, at, number), dS[number][None] if ends else None
    return initial_gradient(one, request, grad_o[:, start:end], last)[0]


def _initial_gradient(call: Call, at: Placement, dS: Tensor | None, final: Tensor | None) -> Tensor:
    """The gradient of initial_state: rows of the sequences that begin on this rank, zeros
    elsewhere."""
    assert call.initial_state is not None
    assert dS is not None
    found = dS.new_zeros((at.split.sequences, *dS.shape[1:]))
    _copy_rows(dS, at.split.first, found)
    if final is not None:
        _copy_rows(final, {n: n for n in at.split.empty}, found)
    found = found.mT if call.state_v_first else found
    return found.to(call.initial_state.dtype).contiguous()
