"""Forward: which kernels a kind of call takes, and their buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Forward
from gdn.problem import CHUNK, Call

from .prepare import prepare
from .scan import scan


def warpgroups(V: int, walks: int) -> int:
    """How many warpgroups a program of the scan gets: one where that leaves fewer multiprocessors
    idle."""
    return 2 if V == 128 and walks > 66 else 1


def slots(call: Call) -> int:
    """Chunks, counted so that the place of each follows from where it starts: in packed input chunk
    i of sequence n has the number cu_seqlens[n] // CHUNK + n + i, and some stay unused."""
    B, T = call.q.shape[:2]
    return T // CHUNK + call.sequences if call.cu_seqlens is not None else B * -(-T // CHUNK)


def saved_like(call: Call) -> list[Tensor]:
    """Empty tensors for what forward hands on: of every chunk and value head G, beta and the
    reciprocal norms of q and k, and the inverse that couples its tokens."""
    number, HV = slots(call), call.v.shape[2]
    return [
        call.q.new_empty((number, HV, 4, CHUNK), dtype=torch.float32),
        call.q.new_empty((number, HV, CHUNK, CHUNK)),
    ]


def _name(x: Tensor | None, otherwise: str) -> str:
    return otherwise if x is None else str(x.dtype).removeprefix("torch.")


def _ready(x: Tensor | None) -> Tensor | None:
    """x, or a copy as TMA wants it: contiguous, and starting at a multiple of 16 bytes."""
    if x is None or (x.is_contiguous() and not x.data_ptr() % 16):
        return x
    return x.clone(memory_format=torch.contiguous_format)


class Plan:
    """All that calls of one kind (shapes, dtypes, device, options) have in common."""

    def __init__(self, call: Call) -> None:
        K, (HV, V) = call.q.shape[3], call.v.shape[2:]
        self.sequences, self.state, self.slots = call.sequences, call.state_shape, slots(call)
        shared = {
            "dtype": _name(call.q, ""),
            "offsets": _name(call.cu_seqlens, "int32"),
            "K": K,
            "V": V,
            "varlen": call.cu_seqlens is not None,
        }
        self.prepare: dict[str, Any] = shared | {
            "gates": _name(call.g, ""),
            "strengths": _name(call.beta, ""),
            "l2": call.use_qk_l2norm_in_kernel,
            "gate": call.use_gate_in_kernel,
            "bias": call.dt_bias is not None,
            "sigmoid": call.use_beta_sigmoid_in_kernel,
            "double": call.allow_neg_eigval,
        }
        self.scan: dict[str, Any] = shared | {
            "warpgroups": warpgroups(V, self.sequences * HV),
            "initial": call.initial_state is not None,
            "final": call.output_final_state,
            "v_first": call.state_v_first,
        }
        self.kernels: dict[bool, tuple[Any, Any]] = {}

    def compiled(self, save: bool) -> tuple[Any, Any]:
        """The two kernels."""
        if save not in self.kernels:
            self.kernels[save] = prepare(**self.prepare, save=save), scan(**self.scan)
        return self.kernels[save]

    def forward(self, call: Call, save: bool) -> Forward:
        """See `gdn.backend.Backend.forward`."""
        HV, dtype, new_empty = call.v.shape[2], call.q.dtype, call.q.new_empty
        q, k, v, g, beta = (_ready(x) for x in call[:5])
        A_log, dt_bias = (None if x is None else x.float() for x in (call.A_log, call.dt_bias))
        o = torch.empty(call.v.shape, dtype=dtype, device=call.v.device)
        end = new_empty(self.state, dtype=torch.float32) if call.output_final_state else None
        matrices = new_empty((self.slots, HV, 3, CHUNK, CHUNK))
        walk = new_empty((self.slots, HV, 3, CHUNK), dtype=torch.float32)
        saved = saved_like(call) if save else []
        if call.cu_seqlens is not None:
            for x in saved:
                x.zero_()  # numbers of chunks may stay unused
        prepare_chunks, walk_chunks = self.compiled(save)
        prepare_chunks(
            q, k, g, beta, A_log, dt_bias, call.cu_seqlens, matrices, walk,
            *(saved or (None, None)), self.sequences, call.scale,
        )  # fmt: skip
        walk_chunks(
            q, k, v, matrices, walk, _ready(call.initial_state), call.cu_seqlens, o, end,
            self.sequences,
        )  # fmt: skip
        return Forward(o, end, saved)
