"""Batches of vLLM and what they must give: requests with a history of tokens whose outputs and
states are known after each token, from gdn's definition in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.definition import activate, recurrence
from gdn.problem import Call

WIDTH = 4
"""Of the short convolution."""


@dataclass(frozen=True)
class Layer:
    """Sizes and parameters of a layer, in float32. Without a convolution q, k, v are the raw
    ones."""

    H: int = 2
    HV: int = 4
    K: int = 16
    V: int = 24
    per_channel: bool = False
    convolved: bool = False
    allow_neg_eigval: bool = False
    gate_lower_bound: float | None = None

    @property
    def channels(self) -> int:
        return 2 * self.H * self.K + self.HV * self.V

    @cached_property
    def A_log(self) -> Tensor:
        return random(1, self.HV) / 2

    @cached_property
    def dt_bias(self) -> Tensor:
        return random(2, self.HV * (self.K if self.per_channel else 1))

    @cached_property
    def weight(self) -> Tensor:
        return random(3, self.channels, WIDTH) / 2


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(eq=False)
class Request:
    """Tokens of a request, those of earlier batches included: raw qkv [T, channels], gate [T, ...]
    and beta [T, HV]; o [T, HV, V], and the states [T + 1, HV, V, K] before the first token and
    after each."""

    layer: Layer
    seed: int
    T: int
    qkv: Tensor = field(init=False)
    gate: Tensor = field(init=False)
    beta: Tensor = field(init=False)
    o: Tensor = field(init=False)
    states: Tensor = field(init=False)
    raw: tuple[Tensor, Tensor, Tensor] | None = None  # qkv, gate and beta; None: from the seed

    def __post_init__(self) -> None:
        x, T = self.layer, self.T
        gates = (x.HV, x.K) if x.per_channel else (x.HV,)
        self.qkv, self.gate, self.beta = self.raw or (
            random(self.seed, T, x.channels),
            random(self.seed + 1000, T, *gates),
            random(self.seed + 2000, T, x.HV),
        )
        qkv = self.qkv.double()
        if x.convolved:
            padded = F.pad(qkv.T, (WIDTH - 1, 0))[None]
            weight = x.weight.double()[:, None]
            qkv = F.silu(F.conv1d(padded, weight, groups=x.channels))[0].T
        q, k, v = qkv.split([x.H * x.K, x.H * x.K, x.HV * x.V], -1)
        bias = x.dt_bias.view(x.HV, x.K) if x.per_channel else x.dt_bias
        call = Call(
            q.view(1, T, x.H, x.K), k.view(1, T, x.H, x.K), v.view(1, T, x.HV, x.V),
            self.gate[None], self.beta[None], A_log=x.A_log, dt_bias=bias,
            gate_lower_bound=x.gate_lower_bound, allow_neg_eigval=x.allow_neg_eigval,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip
        q, k, g, beta = activate(call, torch.float64)
        q, k = (y.repeat_interleave(x.HV // x.H, 2) for y in (x.K**-0.5 * q, k))
        state = torch.zeros(1, x.HV, x.K, x.V, dtype=torch.float64)
        outputs, states = [], [state]
        for t in range(T):
            o, state = recurrence(*(y[:, t : t + 1] for y in (q, k, call.v, g, beta)), state)
            outputs.append(o[0])
            states.append(state)
        self.o, self.states = torch.cat(outputs), torch.cat(states).mT


make_request = functools.cache(Request)
"""The same request for the same arguments: it takes half a second."""


@dataclass
class Row:
    """What a batch runs of a request: `length` tokens from `start` on.

    slots: that of its state, or for a speculative step, of which `accepted` tokens of the last one
    count, a column a token. checkpoint: a number of tokens, and the slot of the state after them.
    """

    request: Request
    start: int
    length: int
    slots: tuple[int, ...]
    accepted: int | None = None
    checkpoint: tuple[int, int] | None = None

    def tokens(self, name: str) -> Tensor:
        x: Tensor = getattr(self.request, name)
        return x[self.start : self.start + self.length]

    @property
    def first(self) -> int:
        """The slot that it starts from."""
        return self.slots[(self.accepted or 1) - 1]

    def written(self) -> dict[int, Tensor]:
        """The states that it leaves, by slot."""
        states = self.request.states[self.start :]
        if self.accepted is not None:
            return {slot: states[t + 1] for t, slot in enumerate(self.slots[: self.length])}
        left = {self.slots[0]: states[self.length]}
        if self.checkpoint is not None:
            offset, slot = self.checkpoint
            left[slot] = states[offset]
        return left


def together(rows: list[Row], name: str) -> Tensor:
    """A tensor of the batch's tokens."""
    return torch.cat([row.tokens(name) for row in rows])


def fill(pool: Tensor, rows: list[Row]) -> None:
    """Noise in all slots [slots, HV, V, K], then the states that the rows start from. Rows that
    begin keep the noise: it must not be read."""
    pool.copy_(random(7, *pool.shape))
    for row in rows:
        if row.start:
            pool[row.first] = row.request.states[row.start].to(pool.dtype)


def check(rows: list[Row], out: Tensor, before: Tensor, after: Tensor, tolerance: float) -> None:
    """out [T, HV, V] and the pool are right, and slots that no row writes keep their bits."""
    expected = together(rows, "o")
    states: dict[int, Tensor] = {}
    for row in rows:
        states |= row.written()
    options = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(out[: len(expected)].double(), expected, **options)
    for slot, state in states.items():
        torch.testing.assert_close(after[slot].double(), state, **options)
    others = [slot for slot in range(len(before)) if slot not in states]
    assert torch.equal(before[others], after[others])
    assert others[0] == 0, "the null block must be one of them"
