"""The contract of a backend: its capabilities as data, the reasons that follow from them, and the
base classes `Backend` and `Plan`."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gdn.problem import Call, PoolCall, Prefill, Problem, Step


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can run. Dispatch, error texts, test skips and the table in docs/backends.md
    are made from it.

    Every feature is off unless it is declared: a backend that declares only `dtypes` gets dense
    calls without states, options and gradients, with HV = H, on any device and of any size.

    Attributes:
        dtypes: dtypes of q, k and v.
        packages: modules that the backend imports.
        devices: torch device types; empty for any.
        min_sm, max_sm: lowest and highest compute capability times ten.
        head_dims: admissible K and V; empty for any up to max_k and max_v.
        gva: HV may be a multiple of H (grouped value heads).
        varlen: cu_seqlens, sequences packed along T.
        initial_state: a call may start from given states.
        backward: gradients.
        deterministic: two runs of the same call are bit-equal.
        cuda_graph: dense calls can be captured in a CUDA graph.
        resets: gates far below zero, -inf included, cost no precision at the tokens around them.
        flags: the boolean options of `gdn.problem.Call` that the backend understands.
        decode: dtypes of the state pools that it decodes from; empty for no decode.
        speculative: decode keeps the state after each token (state_indices [N, 1 + T]).
        output_states: decode may write new states to another pool.
        prefill: dtypes of the state pools that it prefills on; empty for none.
        checkpoints: prefill on a pool also stores states before the last ones.
        per_channel: g may be [B, T, HV, K], a decay for each channel of K.
        gate_lower_bound: the fused gate may have a lower bound.
        context_parallel: sequences may be split over ranks (cp=). `gdn.distributed` makes the
            summaries of a part from the backend's own calls, or the plan does (`exchanges`); this
            says that they are tested.
        batch_invariant: with `Call.batch_invariant` a sequence gets the same bits whatever is
            computed beside it (`gdn.batch_invariant`).
    """

    dtypes: tuple[torch.dtype, ...]
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    min_sm: int | None = None
    max_sm: int | None = None
    head_dims: tuple[int, ...] = ()
    max_k: int | None = None
    max_v: int | None = None
    gva: bool = False
    varlen: bool = False
    initial_state: bool = False
    backward: bool = False
    deterministic: bool = False
    cuda_graph: bool = False
    resets: bool = False
    flags: frozenset[str] = frozenset()
    decode: tuple[torch.dtype, ...] = ()
    speculative: bool = False
    output_states: bool = False
    prefill: tuple[torch.dtype, ...] = ()
    checkpoints: bool = False
    per_channel: bool = False
    gate_lower_bound: bool = False
    context_parallel: bool = False
    batch_invariant: bool = False


def _names(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def reasons_against(capabilities: Capabilities, problem: Problem) -> list[str]:
    """Every reason why a backend with these capabilities cannot run this problem; empty if it
    can."""
    c, p = capabilities, problem
    reasons = []
    if p.dtype not in c.dtypes:
        reasons.append(f"dtype must be one of {_names(*c.dtypes)}, got {_names(p.dtype)}")
    pools = c.prefill if p.prefill else c.decode
    if p.pool is not None and not pools:
        reasons.append(f"{'prefill on a pool' if p.prefill else 'decode'} is not supported")
    elif p.pool is not None and p.pool not in pools:
        reasons.append(f"state must be one of {_names(*pools)}, got {_names(p.pool)}")
    if p.speculative and not c.speculative:
        reasons.append("a slot for each token (state_indices [N, 1 + T]) is not supported")
    if p.output_states and not c.output_states:
        reasons.append("output_states are not supported")
    if p.checkpoints and not c.checkpoints:
        reasons.append("checkpoints are not supported")
    if c.devices and p.device not in c.devices:
        reasons.append(f"tensors must be on {' or '.join(c.devices)}, got {p.device}")
    elif (c.min_sm or c.max_sm) and p.sm is None:
        reasons.append("needs an NVIDIA GPU")
    elif p.sm is not None:
        if c.min_sm and p.sm < c.min_sm:
            reasons.append(f"needs sm_{c.min_sm} or newer, got sm_{p.sm}")
        if c.max_sm and p.sm > c.max_sm:
            reasons.append(f"needs sm_{c.max_sm} or older, got sm_{p.sm}")
    for name, size, limit in (("K", p.K, c.max_k), ("V", p.V, c.max_v)):
        if c.head_dims and size not in c.head_dims:
            reasons.append(f"{name} must be one of {', '.join(map(str, c.head_dims))}, got {size}")
        if limit is not None and size > limit:
            reasons.append(f"{name} must be at most {limit}, got {size}")
    if p.HV != p.H and not c.gva:
        reasons.append(f"HV must equal H (no grouped value heads), got H = {p.H}, HV = {p.HV}")
    if p.varlen and not c.varlen:
        reasons.append("cu_seqlens is not supported")
    if p.initial_state and not c.initial_state:
        reasons.append("initial_state is not supported")
    if p.needs_grad and not c.backward:
        reasons.append("backward is not supported, and an input requires grad")
    if p.per_channel and not c.per_channel:
        reasons.append("a decay per channel (g [B, T, HV, K]) is not supported")
    if p.gate_lower_bound is not None and not c.gate_lower_bound:
        reasons.append("gate_lower_bound is not supported")
    if p.context_parallel and not c.context_parallel:
        reasons.append("context parallelism (cp=, gdn.distributed) is not supported")
    if p.batch_invariant and not c.batch_invariant:
        reasons.append("batch invariance (gdn.batch_invariant) is not supported")
    if p.batch_invariant and p.context_parallel:
        reasons.append("parts that ranks join (cp=, gdn.distributed) are not batch-invariant")
    reasons.extend(f"{flag} is not supported" for flag in sorted(p.flags - c.flags))
    return reasons


def _is_installed(name: str) -> bool:
    """Whether a module can be found. For a dotted name Python imports the packages around it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


class Forward(NamedTuple):
    """What `Plan.forward` returns.

    o [B, T, HV, V] has v's dtype. final_state has `call.state_shape` and `call.state_dtype`; it may
    be None unless call.output_final_state. saved holds fresh tensors for backward, with the shapes
    and dtypes of `Backend.saved_like`, unless that is None.
    """

    o: Tensor
    final_state: Tensor | None
    saved: list[Tensor]


class Gradients(NamedTuple):
    """What `Plan.backward` returns: each gradient has the shape and dtype of its input, and is None
    where the input is None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None


class Plan:
    """How a backend runs all calls of the same shapes, dtypes, devices and options (for decode
    steps also the same strides).

    The backend makes a plan from the first such call, and dispatch keeps it (at most 4096 of them;
    calls with and without gradients have plans of their own; those of a `Step` or `Prefill` are
    also for the same strides). A plan must not keep the call's
    tensors. Its methods run below autograd, with autocast off and the device of q
    current. B, T, N, H, HV, K, V are at least 1. Inputs may be non-contiguous and must not be
    written to. cu_seqlens may end before T. A plan of a `Step` needs only `decode`, one of a
    `Prefill` only `prefill`.
    """

    def forward(self, call: Call, save: bool) -> Forward:
        """Compute o and the final state. With save, also return what backward needs; else saved is
        empty. Tokens past cu_seqlens[-1] have zeros in o, and in backward in all gradients."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        """Compute the gradients of the differentiable inputs from those of o and of the final state
        (None: zero). The backend whose plan ran forward also runs backward: with that plan, or with
        one made again for the same kind of call, if dispatch has dropped it."""
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def decode(self, step: Step) -> Tensor:
        """Take one decode step: return o [B, T, HV, V] in v's dtype (step.out if given), update
        step.state, or step.output_states, in place.

        A sequence is skipped if its slot is step.null_index or outside the pool, or if its
        num_accepted_tokens picks no column of state_indices: o is zero, and no slot changes. A slot
        that would be written and is step.null_index or outside the pool is skipped alone. Tokens
        past cu_seqlens[-1] have zeros in a new o and are untouched in step.out. On a GPU
        cu_seqlens may hold anything: no token outside 0..T may be read or written.
        """
        raise NotImplementedError(f"{type(self).__name__} has no decode")

    def prefill(self, prefill: Prefill) -> Tensor:
        """Run whole sequences on a pool: return o (prefill.out if given), update prefill.state and
        prefill.checkpoints in place.

        Skipped sequences, slots and tokens as in `decode`. A sequence without tokens leaves its
        slot alone, or zeroes it if it is fresh. A checkpoint is skipped if its offset is 0, exceeds
        the length or is no multiple of 64.
        """
        raise NotImplementedError(f"{type(self).__name__} has no prefill")

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        """Compile the kernels of such calls; with backward also those of the gradients. Return
        False if kernels compile at the first call only. Tensors may be on the meta device.
        MissingKernelError if not all kernels are there and none can be compiled here."""
        return False


class MissingKernelError(RuntimeError):
    """Kernels are not there, and cannot be compiled here."""


class Backend(ABC):
    """One engine for the op. Subclass it, set the class variables, and hand an instance to
    `gdn.register_backend`.

    `priority` orders backends under "auto", highest first; None keeps a backend out of "auto".
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    priority: ClassVar[int | None] = None

    def unavailable(self) -> str | None:
        """Why this backend cannot run in this process at all, or None. Must not import packages or
        touch a device. An exception here, in `unsupported` or in `path` counts as a reason against
        the backend."""
        missing = [name for name in self.capabilities.packages if not _is_installed(name)]
        return f"not installed: {', '.join(missing)}" if missing else None

    def unsupported(self, problem: Problem) -> list[str]:
        """Reasons against a problem that no field of Capabilities can express."""
        return []

    def unprepared(self, call: Call | PoolCall, backward: bool) -> list[str]:
        """Reasons against one call, or with backward also its gradients, that its Problem does not
        tell: kernels that are not there and cannot be compiled here. Asked last, once for each kind
        of call. Must not compile."""
        return []

    def preparation(self, call: Call | PoolCall, backward: bool) -> str:
        """Where the code of this call comes from, for `gdn.explain`; empty if that is no question.
        Must not compile."""
        return ""

    def path(self, problem: Problem) -> str:
        """Which internal path would run this problem, for `gdn.explain` and `gdn compare`."""
        return self.name

    def saved_like(self, call: Call) -> list[Tensor] | None:
        """Empty tensors with the shapes and dtypes of `Forward.saved` for this call. Also runs on
        fake tensors. None if only forward can know them: torch.compile then cannot trace calls with
        gradients."""
        return []

    def exchanges(self, call: Call) -> bool:
        """Whether the plan of a call like this one, but with `context_parallel`, is a
        `gdn.exchange.ExchangingPlan`."""
        return False

    @abstractmethod
    def plan(self, call: Call | PoolCall) -> Plan:
        """Make the plan for calls like this one. Dispatch asks only for calls that this backend
        can run."""
