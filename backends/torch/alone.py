"""Batch-invariant calls: each sequence and q/k head, with its value heads, is computed alone, in
tensors whose shapes do not depend on the batch. PyTorch's products and sums round as shapes say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn.backend import Forward, Gradients
from gdn.problem import CHUNK, Call, PoolCall

from . import chunk_loop

ROWS = (
    "state_indices", "num_accepted_tokens", "output_indices", "fresh", "checkpoint_offsets",
    "checkpoint_indices",
)  # fmt: skip
"""Tensors of a call on a pool that have a row for each sequence."""


class Part(NamedTuple):
    """One q/k head of one sequence: where it lies in the call's tensors.

    keys: of q and k [B, T, H, K]; values: of v, g, beta and o [B, T, HV, ...]; states: of states
    [N, HV, ...]; value_heads: of parameters [HV, ...]; saved: of what forward saves [rows, H, ...].
    """

    keys: tuple[slice, slice, slice]
    values: tuple[slice, slice, slice]
    states: tuple[slice, slice]
    value_heads: slice
    saved: tuple[slice, slice]

    def of(self, call: Call) -> Call:
        """The call of this part alone, dense; with copies, so that all parts are aligned alike, and
        with exact parameters, since their gradients are added up."""

        def take(x: Tensor | None, at: Any) -> Any:
            return None if x is None else x[at].clone(memory_format=torch.contiguous_format)

        def exact(x: Tensor | None) -> Any:
            return None if x is None else x.to(call.state_dtype)

        q, k = take(call.q, self.keys), take(call.k, self.keys)
        v, g, beta = (take(x, self.values) for x in (call.v, call.g, call.beta))
        initial = take(call.initial_state, self.states)
        A_log, dt_bias = (take(exact(x), self.value_heads) for x in (call.A_log, call.dt_bias))
        return call._replace(
            q=q, k=k, v=v, g=g, beta=beta, initial_state=initial, A_log=A_log, dt_bias=dt_bias,
            cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None,
        )  # fmt: skip

    def on_pool(self, given: PoolCall) -> PoolCall:
        """The same of a call on a pool; with views of the tensors that it writes."""
        rows, fields = self.states[0], given._asdict()
        changed = {n: fields[n][rows] for n in ROWS if fields.get(n) is not None}
        for name in ("state", "output_states"):
            if fields.get(name) is not None:
                changed[name] = fields[name][:, self.value_heads]
        if fields.get("checkpoints") is not None:
            changed["checkpoints"] = fields["checkpoints"][rows, ..., self.value_heads, :, :]
        return given._replace(call=self.of(given.call), out=None, **changed)


def split(call: Call) -> Iterator[Part]:
    """The parts of a call. A sequence without tokens has parts too."""
    T, H, group = *call.q.shape[1:3], call.v.shape[2] // call.q.shape[2]
    bounds = None
    if call.cu_seqlens is not None:
        bounds = (call.cu_seqlens if call.cu_seqlens_cpu is None else call.cu_seqlens_cpu).tolist()
    chunks = 0  # of the sequences before
    for n in range(call.sequences):
        row, first, last = (n, 0, T) if bounds is None else (0, bounds[n], bounds[n + 1])
        own = -(-(last - first) // CHUNK)
        for h in range(H):
            head, heads = slice(h, h + 1), slice(h * group, (h + 1) * group)
            at = slice(row, row + 1), slice(first, last)
            yield Part(
                (*at, head), (*at, heads), (slice(n, n + 1), heads), heads,
                (slice(chunks, chunks + own), head),
            )  # fmt: skip
        chunks += own


def forward(call: Call, save: bool, *rounding: Any) -> Forward:
    """`chunk_loop.forward` of each part."""
    o, final_state = call.v.new_zeros(call.v.shape), None
    if call.output_final_state:
        final_state = call.v.new_empty(call.state_shape, dtype=call.state_dtype)
    saved = [x.zero_() for x in chunk_loop.saved_like(call)] if save else []
    for part in split(call):
        got = chunk_loop.forward(part.of(call), save, *rounding)
        o[part.values] = got.o
        if final_state is not None and got.final_state is not None:
            final_state[part.states] = got.final_state
        for whole, x in zip(saved, got.saved, strict=True):
            whole[part.saved] = x
    return Forward(o, final_state, saved)


def backward(
    call: Call,
    saved: list[Tensor],
    grad_o: Tensor,
    grad_final_state: Tensor | None,
    *rounding: Any,
) -> Gradients:
    """`chunk_loop.backward` of each part. Gradients of A_log and dt_bias are sums over the
    sequences, in their order."""
    tensors, parameters = call.differentiable[:-2], call.differentiable[-2:]
    found = [None if x is None else x.new_zeros(x.shape) for x in tensors]
    found += [
        None if x is None else x.new_zeros(x.shape, dtype=call.state_dtype) for x in parameters
    ]
    for part in split(call):
        final = None if grad_final_state is None else grad_final_state[part.states].contiguous()
        got = chunk_loop.backward(
            part.of(call), [x[part.saved].contiguous() for x in saved],
            grad_o[part.values].contiguous(), final, *rounding,
        )  # fmt: skip
        places = [part.keys] * 2 + [part.values] * 3 + [part.states] + [part.value_heads] * 2
        for whole, x, at in zip(found, got, places, strict=True):
            if whole is not None and x is not None:
                whole[at] += x
    return Gradients(*(
        None if x is None or like is None else x.to(like.dtype)
        for x, like in zip(found, call.differentiable, strict=True)
    ))  # type: ignore[arg-type] # fmt: skip


def run(given: PoolCall, compute: Callable[[Any], Tensor]) -> Tensor:
    """A decode step or a prefill on a pool, part by part. cu_seqlens must not leave 0..T."""
    call = given.call
    o = call.v.new_zeros(call.v.shape) if given.out is None else given.out
    if given.state_indices is None:
        slots = torch.arange(call.sequences, device=given.state.device)
        given = given._replace(state_indices=slots)
    for part in split(call):
        o[part.values] = compute(part.on_pool(given))
    return o
