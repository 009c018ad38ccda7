"""One call of an op: `Call` (whole sequences), `Prefill` (whole sequences on a pool of states) and
`Step` (decode) hold its tensors and options, `Problem` describes it from metadata alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

CHUNK = 64
"""Tokens per chunk, in every chunked backend."""


DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")
"""The fields of `Call` that may require grad, in the order of `gdn.backend.Gradients`."""


class Call(NamedTuple):
    """The arguments of one `gdn.gated_delta_net` call, under their public names and with defaults
    filled in.

    `batch_invariant`, which is no argument, is the mode in force (`gdn.invariance`);
    `context_parallel`, which is none either, says that the tokens are one rank's part and that the
    plan exchanges states with other ranks (`Backend.exchanges`). This is what a backend receives.
    An option of the op is a field here: the schemas of `torch.ops.gdn`, `FLAGS` and the key under
    which dispatch remembers a plan follow from the fields, in their order (tensors first, then
    numbers, then flags).
    Shapes: q, k [B, T, H, K]; v [B, T, HV, V]; beta [B, T, HV]; g [B, T, HV], or [B, T, HV, K] with
    a decay per channel; initial_state [N, HV, K, V] ([N, HV, V, K] if state_v_first); A_log [HV];
    dt_bias [HV], or [HV, K] per channel; cu_seqlens [N + 1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None = None
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_indices: Tensor | None = None
    scale: float = 1.0
    gate_lower_bound: float | None = None
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    state_v_first: bool = False
    batch_invariant: bool = False
    context_parallel: bool = False

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The inputs named in `DIFFERENTIABLE`."""
        return (
            self.q, self.k, self.v, self.g, self.beta,
            self.initial_state, self.A_log, self.dt_bias,
        )  # fmt: skip

    @property
    def per_channel(self) -> bool:
        """Whether each channel of K has its own decay."""
        return self.g.dim() == 4

    @property
    def sequences(self) -> int:
        """N, the number of sequences."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """[N, HV, K, V], or [N, HV, V, K] with state_v_first."""
        rows, columns = self.q.shape[3], self.v.shape[3]
        if self.state_v_first:
            rows, columns = columns, rows
        return self.sequences, self.v.shape[2], rows, columns

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype in which state is kept and returned: float32, or float64 for float64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


class Step(NamedTuple):
    """The arguments of one `gdn.gated_delta_net_decode` call: the tokens and options as a `Call`
    without an initial state, and the pool of states that they start from.

    state [slots, HV, K, V] ([slots, HV, V, K] if state_v_first), the last three dimensions
    contiguous; state_indices None, [N], or with a slot for each token [N, 1 + T] (leading_column)
    or [N, T]; num_accepted_tokens [N]; out [B, T, HV, V], written instead of a new tensor;
    output_states like state, written instead of it at output_indices [N] or [N, T].
    """

    call: Call
    state: Tensor
    state_indices: Tensor | None = None
    num_accepted_tokens: Tensor | None = None
    out: Tensor | None = None
    output_states: Tensor | None = None
    output_indices: Tensor | None = None
    null_index: int = -1
    leading_column: bool = True

    @property
    def written(self) -> tuple[Tensor | None, ...]:
        """The tensors that the step updates in place."""
        return (self.state if self.output_states is None else self.output_states), self.out

    @property
    def written_table(self) -> Tensor | None:
        """The slots that the step writes, [N] or with a column a token."""
        return self.state_indices if self.output_states is None else self.output_indices

    @property
    def speculative(self) -> bool:
        """Whether each token's state is stored in its own slot."""
        table = self.written_table
        return table is not None and table.dim() == 2

    @property
    def first_column(self) -> int:
        """The column of `written_table` that takes the state after the first token."""
        return int(self.leading_column and self.output_states is None)


class Prefill(NamedTuple):
    """The arguments of one `gdn.gated_delta_net_prefill` call: the tokens and options as a `Call`
    without an initial state, and the pool of states that they start from and end in.

    state as in `Step`; state_indices and fresh [N]; checkpoint_offsets [N] or [N, C], and either
    checkpoint_indices of that shape or checkpoints [N, HV, ...] or [N, C, HV, ...]; out as in
    `Step`.
    """

    call: Call
    state: Tensor
    state_indices: Tensor | None = None
    fresh: Tensor | None = None
    checkpoint_offsets: Tensor | None = None
    checkpoint_indices: Tensor | None = None
    checkpoints: Tensor | None = None
    out: Tensor | None = None
    null_index: int = -1

    @property
    def written(self) -> tuple[Tensor | None, ...]:
        """The tensors that the call updates in place."""
        return self.state, self.checkpoints, self.out


PoolCall = Step | Prefill
"""A call on a pool of states."""


def is_live(slots: Any, pool: Tensor, null_index: int) -> Any:
    """Whether slots, a number or a tensor, are in the pool and not null_index."""
    return (slots != null_index) & (slots >= 0) & (slots < pool.shape[0])


def argument_types(kind: type[Call | PoolCall]) -> dict[str, Any]:
    """The names and types of an op's arguments, in the order of its schema: the fields of `Call`,
    and after them those that only a `Step` or `Prefill` has."""
    own = {name: hint for name, hint in get_type_hints(kind).items() if hint is not Call}
    return own if kind is Call else argument_types(Call) | own


def count_tensors(kind: type[Call | PoolCall]) -> int:
    """How many own fields of a kind are tensors: the first ones, after the `Call`."""
    own = (hint for hint in get_type_hints(kind).values() if hint is not Call)
    return sum(Tensor in (hint, *get_args(hint)) for hint in own)


CALL_TENSORS = count_tensors(Call)
"""How many fields of a `Call` are tensors: the first ones."""
POOL_TENSORS = {kind: 1 + count_tensors(kind) for kind in (Step, Prefill)}
"""The field of a call on a pool after its last tensor. The tensors begin at field 1."""
_MODES = ("batch_invariant", "context_parallel")
FLAGS = tuple(n for n, hint in argument_types(Call).items() if hint is bool and n not in _MODES)
"""The boolean options of `Call`: without those that are no arguments."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One call as dispatch sees it: sizes, dtype, device and options, without tensors.

    `sm` is the compute capability of an NVIDIA device times ten (90 on Hopper), None elsewhere.
    `flags` holds the names of the boolean options of `Call` that are on. `pool` is the dtype of the
    state pool of a `Step` or `Prefill`, None for a `Call`; `prefill` tells these two apart;
    `checkpoints`: the prefill stores states before the last ones; `speculative` as in `Step`;
    `output_states`: the step has them; `per_channel` and `gate_lower_bound` as in `Call`.
    `context_parallel`: the call is one rank's part; `batch_invariant` as in `Call`.
    """

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    dtype: torch.dtype
    device: str
    sm: int | None
    varlen: bool
    initial_state: bool
    needs_grad: bool
    flags: frozenset[str]
    pool: torch.dtype | None = None
    prefill: bool = False
    checkpoints: bool = False
    speculative: bool = False
    output_states: bool = False
    per_channel: bool = False
    gate_lower_bound: float | None = None
    context_parallel: bool = False
    batch_invariant: bool = False

    def __str__(self) -> str:
        sizes = " ".join(
            f"{name}={getattr(self, name)}" for name in ("B", "T", "H", "HV", "K", "V", "N")
        )
        where = self.device if self.sm is None else f"{self.device} sm_{self.sm}"
        extras = sorted(self.flags)
        extras += [
            name
            for name in (
                "varlen",
                "initial_state",
                "needs_grad",
                "speculative",
                "output_states",
                "checkpoints",
                "per_channel",
                "context_parallel",
                "batch_invariant",
            )
            if getattr(self, name)
        ]
        if self.gate_lower_bound is not None:
            extras.append(f"gate_lower_bound={self.gate_lower_bound:g}")
        if self.pool is not None:
            kind = "prefill on" if self.prefill else "decode from"
            extras.append(f"{kind} {str(self.pool).removeprefix('torch.')} states")
        return " ".join([sizes, str(self.dtype).removeprefix("torch."), where, *extras])


@functools.cache
def compute_capability(device: torch.device) -> int | None:
    """Compute capability of an NVIDIA device times ten. None for any other device, and for a GPU
    that this process does not have (fake tensors may name one)."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    if (device.index or 0) >= torch.cuda.device_count():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def describe(call: Call, needs_grad: bool) -> Problem:
    """The Problem of a call that `gdn.validation.validate` has accepted."""
    B, T, H, K = call.q.shape
    HV, V = call.v.shape[2:]
    return Problem(
        B=B,
        T=T,
        H=H,
        HV=HV,
        K=K,
        V=V,
        N=call.sequences,
        dtype=call.q.dtype,
        device=call.q.device.type,
        sm=compute_capability(call.q.device),
        varlen=call.cu_seqlens is not None,
        initial_state=call.initial_state is not None,
        needs_grad=needs_grad,
        flags=frozenset(name for name in FLAGS if getattr(call, name)),
        per_channel=call.per_channel,
        gate_lower_bound=call.gate_lower_bound,
        context_parallel=call.context_parallel,
        batch_invariant=call.batch_invariant,
    )


def describe_pool_call(given: PoolCall) -> Problem:
    """The Problem of a call that `gdn.validation.validate_pool_call` has accepted."""
    problem = replace(describe(given.call, needs_grad=False), pool=given.state.dtype)
    if isinstance(given, Step):
        output_states = given.output_states is not None
        return replace(problem, speculative=given.speculative, output_states=output_states)
    return replace(problem, prefill=True, checkpoints=given.checkpoint_offsets is not None)
