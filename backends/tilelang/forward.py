"""Forward: which kernels a kind of call takes, and their buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Forward
from gdn.cut import parallel_length, pieces
from gdn.problem import CHUNK, Call

from .carry import carry
from .constants import ROWS
from .launch import dtype_name, entries, together
from .prepare import prepare
from .scan import scan


def warpgroups(V: int, walks: int) -> int:
    """How many warpgroups a program of the scan gets: one where that leaves fewer multiprocessors
    idle."""
    return 2 if V == 128 and walks > 66 else 1


def saved_like(call: Call) -> list[Tensor]:
    """Empty tensors for what forward hands on: of every chunk and value head G, beta and the
    reciprocal norms of q and k, and the inverse that couples its tokens; and if pieces are walked
    at the same time, what each does to a state, and the state that it begins with (`carry.py`)."""
    number, HV = pieces(call, CHUNK), call.v.shape[2]
    saved = [
        call.q.new_empty((number, HV, 4, CHUNK), dtype=torch.float32),
        call.q.new_empty((number, HV, CHUNK, CHUNK)),
    ]
    return saved + walked_like(call, parallel_length(call, ROWS))


def walked_like(call: Call, length: int | None) -> list[Tensor]:
    """Empty tensors for what pieces of `length` tokens do to a state, and what they begin with."""
    if length is None:
        return []
    number, (HV, V), K = pieces(call, length), call.v.shape[2:], call.q.shape[3]
    sizes = ((number, HV, rows, K) for rows in (V + K, V))
    return [call.q.new_empty(size, dtype=torch.float32) for size in sizes]


def gate_options(call: Call) -> dict[str, Any]:
    """What kernels that see the gates and the norms are built for."""
    return {
        "gates": dtype_name(call.g),
        "strengths": dtype_name(call.beta),
        "l2": call.use_qk_l2norm_in_kernel,
        "gate": call.use_gate_in_kernel,
        "bias": call.dt_bias is not None,
        "sigmoid": call.use_beta_sigmoid_in_kernel,
        "double": call.allow_neg_eigval,
    }


def ready(x: Any) -> Any:
    """x, a tensor or None, or a copy as TMA wants it: contiguous, aligned to 16 bytes."""
    if x is None or (x.is_contiguous() and not x.data_ptr() % 16):
        return x
    return x.clone(memory_format=torch.contiguous_format)


class Plan:
    """All that calls of one kind (shapes, dtypes, device, options) have in common."""

    def __init__(self, call: Call) -> None:
        K, (HV, V) = call.q.shape[3], call.v.shape[2:]
        self.sequences, self.state = call.sequences, call.state_shape
        self.slots, self.length = pieces(call, CHUNK), parallel_length(call, ROWS)
        shared = {
            "dtype": dtype_name(call.q),
            "offsets": dtype_name(call.cu_seqlens, "int32"),
            "K": K,
            "V": V,
            "varlen": call.cu_seqlens is not None,
        }
        self.prepare: dict[str, Any] = shared | gate_options(call)
        walk = {n: shared[n] for n in ("offsets", "K", "V", "varlen")} | {
            "initial": call.initial_state is not None,
            "final": call.output_final_state,
            "v_first": call.state_v_first,
        }
        self.walks: list[tuple[Any, dict[str, Any]]]
        common = {"dtype": shared["dtype"], "transfer": False}
        if self.length is None:
            several = warpgroups(V, self.sequences * HV)
            self.walks = [(scan, walk | common | {"warpgroups": several, "cut": False})]
        else:
            self.pieces = pieces(call, self.length)
            common |= {"warpgroups": 1, "cut": True}
            transfer = walk | common | {"final": True, "transfer": True}
            self.walks = [(scan, transfer), (carry, walk | {"final": False, "reverse": False})]
            self.walks += [(scan, walk | common | {"initial": True})]
        self.runs: dict[bool, list[Any]] = {}

    def kernels(self, save: bool) -> list[Any]:
        """The compiled kernels, in the order of their launches."""
        return together((prepare, self.prepare | {"save": save}), *self.walks)

    def forward(self, call: Call, save: bool) -> Forward:
        """See `gdn.backend.Backend.forward`."""
        HV, new_empty = call.v.shape[2], call.q.new_empty
        q, k, v, g, beta = (ready(x) for x in call[:5])
        begin, A_log, dt_bias = (
            None if x is None else ready(x.float())
            for x in (call.initial_state, call.A_log, call.dt_bias)
        )
        cu_seqlens = ready(call.cu_seqlens)
        o = torch.empty_like(v)
        end = new_empty(self.state, dtype=torch.float32) if call.output_final_state else None
        matrices = new_empty((self.slots, HV, 2, CHUNK, CHUNK))
        walk = new_empty((self.slots, HV, 4, CHUNK), dtype=torch.float32)
        saved = saved_like(call) if save else walked_like(call, self.length)
        if save and cu_seqlens is not None:
            for x in saved[:2]:
                x.zero_()  # numbers of chunks may stay unused
        if save not in self.runs:
            self.runs[save] = entries(self.kernels(save))
        prepare_chunks, *walks = self.runs[save]
        prepare_chunks(
            q, k, g, beta, A_log, dt_bias, cu_seqlens, matrices, walk,
            *(saved[:2] if save else (None, None)), self.sequences, call.scale,
        )  # fmt: skip
        tensors, N = (q, k, v, matrices, walk), self.sequences
        if self.length is None:
            walks[0](*tensors, begin, cu_seqlens, o, end, N, N, 0, 0)
        else:
            many, (walked, begins) = (N, self.pieces, self.length), saved[-2:]
            walks[0](*tensors, begin, cu_seqlens, o, walked, *many, int(save))
            walks[1](walked, None, begins, begin, None, cu_seqlens, N, q.shape[1], self.length)
            walks[2](*tensors, begins, cu_seqlens, o, end, *many, 0)
        return Forward(o, end, saved if save else [])
