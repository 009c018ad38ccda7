"""One call of an op: `Call` (a whole sequence) and `Step` (decode) hold its tensors and options,
`Problem` describes it from metadata alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
"""Tokens a chunk, in every chunked backend."""


class Call(NamedTuple):
    """The arguments of one `gdn.gated_delta_net` call, under their public names and with defaults
    filled in.

    This is what a backend receives, and the order of the schema of `torch.ops.gdn.forward`.
    Shapes: q, k [B, T, H, K]; v [B, T, HV, V]; g, beta [B, T, HV]; initial_state [N, HV, K, V]
    ([N, HV, V, K] if state_v_first); A_log, dt_bias [HV]; cu_seqlens [N + 1].
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
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    state_v_first: bool = False

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The eight inputs that may carry a gradient, in the order of `gdn.backend.Gradients`."""
        return self[:8]

    @property
    def sequences(self) -> int:
        """N: rows of the state."""
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
    """The arguments of one `gdn.gated_delta_net_decode` call, as `Call` is those of the other op;
    the order of the schema of `torch.ops.gdn.decode`.

    state [slots, HV, K, V] ([slots, HV, V, K] if state_v_first), the last three dimensions
    contiguous; state_indices [N], or [N, 1 + T] where the state after each token has its own slot;
    num_accepted_tokens [N]. The rest is shaped as in `Call`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    state_indices: Tensor | None = None
    num_accepted_tokens: Tensor | None = None
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float = 1.0
    null_index: int = -1
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    state_v_first: bool = False

    @property
    def call(self) -> Call:
        """The same tokens and options as a `Call`, from a zero state."""
        return Call(**{name: getattr(self, name) for name in _SHARED})

    @property
    def speculative(self) -> bool:
        """Whether the state after each token goes to its own slot."""
        return self.state_indices is not None and self.state_indices.dim() == 2


_SHARED = tuple(name for name in Step._fields if name in Call._fields)
CALL_TENSORS, STEP_TENSORS = (kind._fields.index("scale") for kind in (Call, Step))
"""How many fields of a `Call`, of a `Step`, are tensors: the first ones, before the options."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What dispatch knows of one call: sizes, dtype, device and options; no tensor, no device read.

    `sm` is the compute capability of an NVIDIA device times ten (90 on Hopper), None elsewhere.
    `flags` holds the names of the boolean options of `Call` that are on. `pool` is the dtype of the
    state pool of a decode step, None for a whole call; `speculative` as in `Step`.
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
    speculative: bool = False

    def __str__(self) -> str:
        sizes = " ".join(
            f"{name}={getattr(self, name)}" for name in ("B", "T", "H", "HV", "K", "V", "N")
        )
        where = self.device if self.sm is None else f"{self.device} sm_{self.sm}"
        extras = sorted(self.flags)
        extras += [
            name
            for name in ("varlen", "initial_state", "needs_grad", "speculative")
            if getattr(self, name)
        ]
        if self.pool is not None:
            extras.append(f"decode from {str(self.pool).removeprefix('torch.')} states")
        return " ".join([sizes, str(self.dtype).removeprefix("torch."), where, *extras])


@functools.cache
def compute_capability(device: torch.device) -> int | None:
    """Compute capability of an NVIDIA device times ten, or None for any other device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


FLAGS = (
    "output_final_state",
    "use_qk_l2norm_in_kernel",
    "use_gate_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "state_v_first",
)


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
    )


def describe_step(step: Step) -> Problem:
    """The Problem of a decode step that `gdn.validation.validate_step` has accepted."""
    problem = describe(step.call, needs_grad=False)
    return replace(problem, pool=step.state.dtype, speculative=step.speculative)
