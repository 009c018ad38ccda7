"""The plan of a decode step: which kernel it takes, and its launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdn.backend import Plan
from gdn.problem import Call, PoolCall, Step

from ...common.allocation import allocator
from ..arguments import dtype_name, lower_bound
from ..kernels import Job, decode_kernel
from ..launch import launchers
from ..tile.thread_shape import choose_shape

_CALL_TENSORS = ("g", "beta", "A_log", "dt_bias", "cu_seqlens")
_STEP_TENSORS = ("state_indices", "num_accepted_tokens", "output_indices")
COUNTS = (1, 32, 128, 2048)
"""Numbers of states at which `choose_shape` changes."""
ANY_COUNT = 128
"""The number of states by which batch-invariant steps choose: a shape has its own order of sums."""


class DecodePlan(Plan):
    """What all steps of one kind (shapes, strides, dtypes, device, options) have in common."""

    def __init__(self, step: Step, single: bool = False, starts: bool = False) -> None:
        """single: of a pack, only the sequences of one token are computed; starts: some of them may
        start from zero, as `fresh` says."""
        call = step.call
        (B, _, HV, V), (H, K) = call.v.shape, call.q.shape[2:]
        states = (B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1) * HV
        vec = 16 // step.state.element_size()
        self.statics: dict[str, Any] = {
            "dtype": dtype_name(call.q), "pool": dtype_name(step.state), "K": K, "V": V,
            "v_first": call.state_v_first, "speculative": step.speculative,
            "l2": call.use_qk_l2norm_in_kernel, "gate": call.use_gate_in_kernel,
            "beta_scale": call.use_beta_sigmoid_in_kernel * (1.0 + call.allow_neg_eigval),
            "table": step.state_indices is not None and step.state_indices.dim() == 2,
            "leading": step.leading_column,
            "clear": call.cu_seqlens is not None and step.out is None and not single,
            "channels": call.per_channel, "lower_bound": lower_bound(call),
        }  # fmt: skip
        if single:
            self.statics |= {"single": True, "starts": starts}
        self.statics |= {name: dtype_name(getattr(call, name)) for name in _CALL_TENSORS}
        self.statics |= {name: dtype_name(getattr(step, name)) for name in _STEP_TENSORS}
        counts = (ANY_COUNT,) if call.batch_invariant else (states, *COUNTS)
        self.shapes, *self.other_shapes = (
            {
                wide: choose_shape(count, K, V, vec if wide else 1, call.state_v_first)
                for wide in (True, False)
            }
            for count in counts
        )
        self.scalars = (step.null_index, HV // H)
        self.channels = call.per_channel
        rows = [call.q, call.k, call.v]
        if self.channels:
            rows += [x for x in (call.g, call.dt_bias) if x is not None]
        self.copies = any(x.stride(-1) != 1 for x in rows)
        self.wide = _strides_allow_16_bytes(step.state)
        if step.output_states is not None:
            self.wide &= _strides_allow_16_bytes(step.output_states)
        self.wide &= all(_strides_allow_16_bytes(_with_rows(x)) for x in rows)
        self.new_o = allocator(call.v.shape, call.v.dtype, call.v.device)
        self.launchers: dict[bool, Any] = {}

    def launcher(self, wide: bool) -> Any:
        """The function that launches the kernel."""
        if wide not in self.launchers:
            (self.launchers[wide],) = launchers([self._job(self.shapes, wide)])
        return self.launchers[wide]

    def _job(self, shapes: dict[bool, Any], wide: bool) -> Job:
        return decode_kernel, self.statics | {"shape": shapes[wide], "wide": wide}

    def jobs(self, call: Call | PoolCall, backward: bool) -> list[Job]:
        """The kernels that steps like this one need: also for tensors that are not aligned to 16
        bytes."""
        return [self._job(self.shapes, wide) for wide in sorted({self.wide, False})]

    def precompile(self, call: Call | PoolCall, backward: bool) -> bool:
        """See `gdn.backend.Plan.precompile`. Also for other numbers of states, and for tensors that
        are not aligned to 16 bytes, since these change while a server runs."""
        launchers(self.all_jobs())
        return True

    def all_jobs(self) -> list[Job]:
        """`jobs` for any number of states."""
        every = (self.shapes, *self.other_shapes)
        return [self._job(shapes, wide) for shapes in every for wide in sorted({self.wide, False})]

    def decode(self, step: Step, fresh: Tensor | None = None) -> Tensor:
        """See `gdn.backend.Plan.decode`. fresh [N]: see `__init__`."""
        call, state = step.call, step.state
        q, k, v, g, dt_bias = call.q, call.k, call.v, call.g, call.dt_bias
        if self.copies:
            q, k, v = _with_rows(q), _with_rows(k), _with_rows(v)
        o = self.new_o() if step.out is None else step.out
        addresses = q.data_ptr() | k.data_ptr() | v.data_ptr() | state.data_ptr()
        if self.channels:
            g = _with_rows(g)
            dt_bias = None if dt_bias is None else _with_rows(dt_bias)
            addresses |= g.data_ptr() | (0 if dt_bias is None else dt_bias.data_ptr())
        if step.output_states is not None:
            addresses |= step.output_states.data_ptr()
        run = self.launcher(self.wide and not addresses % 16)
        run(
            q, k, v, g, call.beta, state, step.state_indices, step.num_accepted_tokens,
            call.A_log, dt_bias, call.cu_seqlens, step.output_states, step.output_indices,
            fresh, o, call.scale, *self.scalars,
        )  # fmt: skip
        return o


def _with_rows(x: Tensor) -> Tensor:
    """x, or a copy of x in which the elements of a head are contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides_allow_16_bytes(x: Tensor) -> bool:
    """Whether all strides but the last are multiples of 16 bytes."""
    size = x.element_size()
    return all(x.shape[i] == 1 or x.stride(i) * size % 16 == 0 for i in range(x.dim() - 1))
