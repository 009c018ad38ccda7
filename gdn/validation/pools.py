"""Checks of calls on a pool of states, from metadata alone."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from gdn.problem import POOL_TENSORS, PoolCall, Prefill, Step

from .metadata import require, require_shape, require_state, shape_of, validate
from .values import has_values

POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
TABLES = (
    "state_indices", "num_accepted_tokens", "output_indices", "checkpoint_offsets",
    "checkpoint_indices",
)  # fmt: skip
"""Tensors of integers."""
IN_PLACE = ("state", "out", "output_states", "checkpoints")
"""Tensors that a call may update in place."""


def validate_pool_call(given: PoolCall) -> None:
    """Raise ValueError unless the step or prefill is well-formed; from metadata alone."""
    call, state, indices = given.call, given.state, given.state_indices
    validate(call)
    N = call.sequences
    exact = call.q.dtype == torch.float64
    dtypes = (torch.float64,) if exact else POOL_DTYPES
    if state.dtype not in dtypes:
        raise ValueError(
            f"state must be {' or '.join(map(str, dtypes))} with q in {call.q.dtype}, "
            f"got {state.dtype}; keep the pool in {'float64' if exact else 'float32'}"
        )
    _require_pool("state", state, given)
    for name in given._fields[1 : POOL_TENSORS[type(given)]]:
        x = getattr(given, name)
        if x is None:
            continue
        if name in TABLES and x.dtype not in INTEGERS:
            raise ValueError(f"{name} must be int32 or int64, got {x.dtype}; cast it with .int()")
        if x.device != call.q.device:
            raise ValueError(
                f"{name} must be on q's device {call.q.device}, got {x.device}; use .to(q.device)"
            )
    if indices is None:
        require_shape("state", state, "[N, ...]", (N, *state.shape[1:]), "; or give state_indices")
    _require_out(given)
    if isinstance(given, Step):
        _validate_step(given)
    else:
        _validate_prefill(given)


def _require_pool(name: str, state: Tensor, given: PoolCall) -> None:
    """Slots of the right shape, each contiguous, which do not overlap."""
    call = given.call
    slots = state.shape[0] if state.dim() == 4 else 0
    require_state(name, state, "slots", (slots, *call.state_shape[1:]), call.state_v_first)
    inner = state.shape[1] * state.shape[2] * state.shape[3]
    # state[:1] would ask for a fake tensor's GPU
    contiguous = state.narrow(0, 0, 1 if slots else 0).is_contiguous()
    if not contiguous or (slots > 1 and state.stride(0) < inner):
        raise ValueError(
            f"{name} must have contiguous slots that do not overlap (slots may be padded), "
            f"got strides {state.stride()}; it is updated in place, and a copy would be lost"
        )


def refuse_negated(given: PoolCall) -> None:
    """ValueError if a tensor that the call updates in place is a negated view."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace is_neg
        return
    for name in IN_PLACE:
        x = getattr(given, name, None)
        if isinstance(x, Tensor) and x.is_neg():  # `check_types` reports other types
            raise ValueError(
                f"{name} must not be a view that negates its elements when read (is_neg), got one; "
                f"it is updated in place, pass {name}.resolve_neg()"
            )


def check_memory(given: PoolCall) -> None:
    """ValueError if two of the states and outputs of a call share memory."""
    other_states = given.output_states if isinstance(given, Step) else given.checkpoints
    if (given.out is None and other_states is None) or not has_values(given.call.q):
        return
    tensors = ((name, getattr(given, name, None)) for name in IN_PLACE)
    present = [(name, x) for name, x in tensors if x is not None]
    for (name, x), (other, y) in itertools.combinations(present, 2):
        if _share_memory(x, y):
            raise ValueError(
                f"{other} must not share memory with {name}, got overlapping tensors; "
                "pass memory of its own, writes to one would change the other"
            )


def _share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether rows of x and y overlap. A row is contiguous, and there may be gaps between rows."""
    if not (x.numel() and y.numel()):
        return False
    (x_start, x_stride, x_row), (y_start, y_stride, y_row) = (
        (a.data_ptr(), a.stride(0) * size, a.numel() // a.shape[0] * size)
        for a, size in ((x, x.element_size()), (y, y.element_size()))
    )
    x_end = x_start + (x.shape[0] - 1) * x_stride + x_row
    y_end = y_start + (y.shape[0] - 1) * y_stride + y_row
    if x_end <= y_start or y_end <= x_start:
        return False
    if x_stride != y_stride or x_stride == 0:
        return True
    gap = (y_start - x_start) % x_stride  # the slots of two pools may alternate in one buffer
    return gap < x_row or gap + y_row > x_stride


def _require_out(given: PoolCall) -> None:
    out, v = given.out, given.call.v
    if out is None:
        return
    require_shape("out", out, "v's shape", shape_of(v))
    require(
        out.dtype == v.dtype,
        lambda: f"out must have v's dtype {v.dtype}, got {out.dtype}; o is written to it",
    )
    _require_contiguous("out", out)


def _require_contiguous(name: str, x: Tensor) -> None:
    require(
        x.is_contiguous(),
        lambda: (
            f"{name} must be contiguous, got strides {x.stride()}; "
            "it is written in place, and a copy would be lost"
        ),
    )


def _require_like(name: str, x: Tensor, state: Tensor) -> None:
    require(
        x.dtype == state.dtype,
        lambda: f"{name} must have state's dtype {state.dtype}, got {x.dtype}; states are copied",
    )


def _validate_step(step: Step) -> None:
    call, indices, columns = step.call, step.state_indices, step.call.q.shape[1]
    extra = int(step.leading_column)
    form = "[N, 1 + T]" if extra else "[N, T]"
    if indices is not None:
        _require_table("state_indices", indices, step, form, columns + extra)
    if step.num_accepted_tokens is not None:
        require_shape("num_accepted_tokens", step.num_accepted_tokens, "[N]", (call.sequences,))
        require(
            indices is not None and indices.dim() == 2,
            lambda: (
                f"num_accepted_tokens must come with state_indices {form}, got "
                f"{None if indices is None else shape_of(indices)}; each token needs its own slot"
            ),
        )
    states, table = step.output_states, step.output_indices
    if states is None or table is None:
        require(
            states is table,
            lambda: (
                "output_states and output_indices must come together, got only "
                f"output_{'states' if table is None else 'indices'}; the indices are its slots"
            ),
        )
        return
    require(
        indices is None or indices.dim() == 1,
        lambda: (
            f"state_indices must be [N] with output_states, got {shape_of(indices)}; "  # type: ignore[arg-type]
            "output_indices [N, T] says where each token's state goes"
        ),
    )
    _require_pool("output_states", states, step)
    _require_like("output_states", states, step.state)
    _require_table("output_indices", table, step, "[N, T]", columns)


def _require_table(name: str, table: Tensor, step: Step, form: str, columns: int) -> None:
    """[N] or two-dimensional with so many columns; packed steps may have fewer or more."""
    N = step.call.sequences
    if table.dim() != 2:
        require_shape(name, table, f"[N] or {form}", (N,))
    elif step.call.cu_seqlens is None or table.shape[0] != N:
        require_shape(name, table, form, (N, columns))
    else:
        require(
            table.shape[1] > 0,
            lambda: (
                f"{name} must have a column or more with cu_seqlens, got {shape_of(table)}; "
                f"pass [N] or {form}"
            ),
        )


def _validate_prefill(prefill: Prefill) -> None:
    N, offsets = prefill.call.sequences, prefill.checkpoint_offsets
    if prefill.state_indices is not None:
        require_shape("state_indices", prefill.state_indices, "[N]", (N,))
    if prefill.fresh is not None:
        require_shape("fresh", prefill.fresh, "[N]", (N,))
        got = prefill.fresh.dtype
        require(got == torch.bool, lambda: f"fresh must be bool, got {got}; cast it with .bool()")
    indices, buffer = prefill.checkpoint_indices, prefill.checkpoints
    places: dict[str, Any] = {"checkpoint_indices": indices, "checkpoints": buffer}
    given = [name for name, x in places.items() if x is not None]
    if offsets is None:
        require(
            not given,
            lambda: f"{given[0]} must come with checkpoint_offsets, got None; pass [N] or [N, C]",
        )
        return
    require(
        len(given) == 1,
        lambda: (
            "checkpoint_offsets must come with either checkpoint_indices or checkpoints, got "
            f"{' and '.join(given) or 'neither'}; states go to the pool or to the buffer"
        ),
    )
    if offsets.dim() != 2:
        require_shape("checkpoint_offsets", offsets, "[N] or [N, C]", (N,))
    else:
        require_shape("checkpoint_offsets", offsets, "[N, C]", (N, offsets.shape[1]))
    if indices is not None:
        shape = shape_of(offsets)
        require_shape("checkpoint_indices", indices, "checkpoint_offsets' shape", shape)
    if buffer is not None:
        inner = (*shape_of(offsets), *prefill.call.state_shape[1:])
        require_shape("checkpoints", buffer, "[N, HV, ...] or [N, C, HV, ...]", inner)
        _require_like("checkpoints", buffer, prefill.state)
        _require_contiguous("checkpoints", buffer)
