"""The shared decode steps: cases, inputs with a pool of states, and reference results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gdn.definition import activate, recurrence
from gdn.problem import Call, Step

from .cases import Case
from .inputs import make_inputs


@dataclass(frozen=True, slots=True)
class StepCase(Case):
    """One kind of decode step: a `Case` of few tokens, and a pool.

    slots: "own" has no state_indices. "one" has one slot per sequence, "each" one slot per token
        and different columns to start from; the pool is three times as large as needed, and every
        third sequence is skipped unless `full`.
    leading: the first column of "each" takes no token's state.
    output: new states go to another pool, the last one of a sequence or that of each token.
    pool: the dtype of the states. padding: elements between slots.
    out: o has a place. tail: tokens past the last sequence, NaN.
    """

    T: int = 1
    slots: Literal["own", "one", "each"] = "one"
    pool: torch.dtype = torch.float32
    padding: int = 0
    null_index: int = -1
    full: bool = False
    leading: bool = True
    output: Literal["none", "last", "each"] = "none"
    out: bool = False
    tail: int = 0


STEPS = (
    StepCase("one-token", B=5, HV=4),
    StepCase("one-token-v-first", B=4, HV=4, state_v_first=True, fused=True),
    StepCase("own-slots", B=3, HV=4, slots="own"),
    StepCase("three-tokens", B=4, T=3, H=1, HV=3, fused=True, allow_neg_eigval=True),
    StepCase("packed", lengths=(2, 0, 1, 4), HV=4, fused=True, state_v_first=True),
    StepCase("head-dim-128", B=4, K=128, V=128, HV=4, padding=64, fused=True),
    StepCase("odd-head-dims", B=4, K=20, V=36, padding=3, null_index=0),
    StepCase("bfloat16-pool", B=4, T=2, HV=4, pool=torch.bfloat16, fused=True),
    StepCase("equal-keys", B=2, T=3, HV=4, cosine=1.0, beta=2.0),
    StepCase("speculative", B=4, T=3, HV=4, slots="each", fused=True),
    StepCase("speculative-packed", lengths=(2, 0, 3, 1), HV=4, slots="each", state_v_first=True),
    StepCase("speculative-bfloat16", B=4, T=2, HV=4, slots="each", pool=torch.bfloat16),
    StepCase("float16-pool", B=4, T=2, HV=4, pool=torch.float16, fused=True, state_v_first=True),
    StepCase("out", B=4, T=2, HV=4, out=True),
    StepCase("padded-pack", lengths=(2, 0, 1, 4), HV=4, tail=5, fused=True),
    StepCase("padded-pack-out", lengths=(1, 1, 1), HV=4, tail=1, out=True, state_v_first=True),
    StepCase("sixteen-tokens", B=2, T=16, slots="each", pool=torch.float16),
    StepCase("no-leading-column", B=4, T=3, HV=4, slots="each", leading=False, fused=True),
    StepCase(
        "no-leading-column-packed",
        lengths=(2, 0, 3, 1),
        slots="each",
        leading=False,
        tail=2,
        state_v_first=True,
    ),
    StepCase("last-elsewhere", B=4, T=3, HV=4, output="last", padding=8),
    StepCase("each-elsewhere", B=4, T=3, HV=4, output="each", state_v_first=True, out=True),
    StepCase("own-elsewhere", lengths=(2, 0, 3), slots="own", output="each", tail=1),
    StepCase("wide-values", B=3, H=1, K=128, V=256, padding=4),
    StepCase("olmo-head-dims", B=3, H=1, K=96, V=192, state_v_first=True, fused=True),
    StepCase("channels", B=4, HV=4, per_channel=True),
    StepCase("channels-olmo-head-dims", B=3, H=1, K=96, V=192, per_channel=True, fused=True),
    StepCase("channels-packed", lengths=(2, 0, 1, 4), K=20, V=36, per_channel=True, fused=True),
    StepCase(
        "channels-speculative",
        B=4,
        T=2,
        HV=4,
        slots="each",
        pool=torch.bfloat16,
        padding=8,
        state_v_first=True,
        fused=True,
        per_channel=True,
        gate_lower_bound=-5.0,
    ),
)
"""Steps that cover every option of `gdn.gated_delta_net_decode`."""


def make_step(
    case: StepCase,
    device: torch.device | str = "cpu",
    seed: int = 0,
    poison: bool = False,
    draw: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Keyword arguments of `gdn.gated_delta_net_decode` for a case, drawn as in `make_inputs`.
    `poison` fills the slots that the step must not read with NaN."""
    inputs = make_inputs(case, draw, seed, draw)
    for name in ("initial_state", "output_final_state"):
        inputs.pop(name, None)
    generator = torch.Generator().manual_seed(seed + 1)
    N, shape = case.sequences, (case.HV, case.K, case.V)
    longest = max(case.lengths or (case.T,))
    columns = 1 if case.slots != "each" else case.leading + longest
    slots = N if case.slots == "own" else 3 * N * columns
    if case.state_v_first:
        shape = (case.HV, case.V, case.K)
    size = case.HV * case.K * case.V
    pool_generator = torch.Generator(draw).manual_seed(seed + 2)
    pool = torch.randn(slots, size + case.padding, generator=pool_generator, device=draw)
    read = torch.arange(N)
    if case.slots != "own":
        order = torch.randperm(slots, generator=generator).tolist()
        free = [slot for slot in order if slot != case.null_index][: N * columns]
        table = torch.tensor(free, dtype=torch.int32).view(N, columns)
        if not case.full:
            table[2::3] = case.null_index
        read = table[:, 0]
        inputs |= {"state_indices": table if case.slots == "each" else read}
        inputs["null_index"] = case.null_index
        if case.slots == "each":
            accepted = torch.arange(N, dtype=torch.int32) % columns
            read = table.gather(1, accepted.long()[:, None])[:, 0]
            inputs["num_accepted_tokens"] = accepted + (not case.leading)
            inputs["leading_column"] = case.leading
    if poison:
        named = set(read.tolist()) - {case.null_index}
        pool[[slot for slot in range(slots) if slot not in named]] = float("nan")
    exact = torch.float64 if case.dtype == torch.float64 else case.pool
    pools = {"state": pool}
    if case.output != "none":
        pools["output_states"] = torch.full((N * longest, size + case.padding), float("nan"))
        table = torch.randperm(N * longest, generator=generator).int().view(N, longest)
        table[1::4, 0] = case.null_index
        inputs["output_indices"] = table if case.output == "each" else table[:, 0].contiguous()
    if case.tail:
        inputs |= add_tail(inputs, case.tail)
    if case.out:
        inputs["out"] = torch.full_like(inputs["v"], float("nan"))
    tensors = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    # with their padding, so that the strides stay
    return tensors | {
        name: x.to(device, exact)[:, :size].view(len(x), *shape) for name, x in pools.items()
    }


def add_tail(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """q, k, v, g and beta with so many more tokens, which are NaN."""
    found = {}
    for name in ("q", "k", "v", "g", "beta"):
        x = inputs[name]
        found[name] = torch.cat([x, x.new_full((1, tokens, *x.shape[2:]), float("nan"))], 1)
    return found


def copy_pool(state: Tensor, device: torch.device | str | None = None) -> Tensor:
    """A copy with the same strides, on the same device or another."""
    device = state.device if device is None else device
    copy = torch.empty_strided(state.shape, state.stride(), dtype=state.dtype, device=device)
    return copy.copy_(state)


def as_step(inputs: dict[str, Any]) -> Step:
    """The Step of keyword arguments of `gdn.gated_delta_net_decode`."""
    own = {name: x for name, x in inputs.items() if name in Step._fields}
    rest = {name: x for name, x in inputs.items() if name not in own}
    return Step(Call(**{"scale": inputs["q"].shape[-1] ** -0.5} | rest), **own)


def named(slot: int, null_index: int, slots: int) -> bool:
    """Whether a slot lies in the pool and is not null_index."""
    return slot != null_index and 0 <= slot < slots


def run_step_definition(
    inputs: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """o, and the pool that the step writes as it is after it, by the definition, in `dtype`, from
    the keyword arguments of `gdn.gated_delta_net_decode`. The arguments are not changed. Tokens
    past the last sequence are zero in o."""
    step = as_step(inputs)
    call = step.call
    q, k, g, beta = activate(call, dtype)
    group = call.v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(group, dim=2) for x in (call.scale * q, k))
    v, pool = call.v.to(dtype), step.state.to(dtype)
    states, o = (pool.mT if call.state_v_first else pool), torch.zeros_like(v)
    into, target = pool, states
    if step.output_states is not None:
        into = step.output_states.to(dtype)
        target = into.mT if call.state_v_first else into
    T, N = q.shape[1], call.sequences
    bounds = [n * T for n in range(N + 1)] if call.cu_seqlens is None else call.cu_seqlens.tolist()
    own = torch.arange(N).view(N, 1)
    table = own if step.state_indices is None else step.state_indices.view(N, -1)
    written = table if step.written_table is None else step.written_table.view(N, -1)
    first = [0] * N
    if step.num_accepted_tokens is not None:
        first = [count - (not step.leading_column) for count in step.num_accepted_tokens.tolist()]
    flat = [x.flatten(0, 1) for x in (q, k, v, g, beta)]
    for n, (row, places) in enumerate(zip(table.tolist(), written.tolist(), strict=True)):
        column, null = first[n], step.null_index
        if not 0 <= column < len(row) or not named(row[column], null, len(pool)):
            continue
        S = states[row[column]][None].clone()
        for t in range(bounds[n + 1] - bounds[n]):
            at = bounds[n] + t
            out, S = recurrence(*(x[None, at : at + 1] for x in flat), S)  # type: ignore[call-arg]
            o.flatten(0, 1)[at] = out[0, 0]
            place = step.first_column + t if step.speculative else 0
            if place < len(places) and named(places[place], null, len(into)):
                target[places[place]] = S[0]
    return o, into
