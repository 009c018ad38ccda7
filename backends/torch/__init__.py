"""Plain PyTorch: chunked, any device, any dtype, any K and V. The reference that the others must
match."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward, Gradients, Plan
from gdn.problem import FLAGS, Call, Step

from .chunk_loop import backward, forward, saved_like
from .decode import decode


class TorchBackend(Backend):
    """`chunk_loop.py` goes over the chunks, `chunk.py` computes one, `layout.py` finds its tokens.

    `operands`, if given, is the dtype that matrix products round to, in place of the default: the
    call's dtype on a GPU, the compute dtype on a CPU.
    """

    name = "torch"
    summary = "chunked PyTorch, any device"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        gva=True,
        varlen=True,
        initial_state=True,
        backward=True,
        deterministic=True,
        cuda_graph=False,  # its triangular solve is not promised to be capturable
        resets=True,
        flags=frozenset(FLAGS),
        decode=(torch.float32, torch.bfloat16, torch.float64),
        speculative=True,
    )
    priority = 100

    def __init__(self, operands: torch.dtype | None = None) -> None:
        self.operands = operands

    def saved_like(self, call: Call) -> list[Tensor]:
        return saved_like(call)

    def plan(self, call: Call | Step) -> TorchPlan:
        return TorchPlan(self.operands)


class TorchPlan(Plan):
    """The same for every call: nothing is worked out ahead."""

    def __init__(self, operands: torch.dtype | None) -> None:
        self.operands = operands

    def forward(self, call: Call, save: bool) -> Forward:
        return forward(call, save, self.operands)

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        return backward(call, saved, grad_o, grad_final_state, self.operands)

    def decode(self, step: Step) -> Tensor:
        return decode(step)


BACKEND = TorchBackend()
