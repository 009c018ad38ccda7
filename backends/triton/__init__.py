"""Our Triton port: two kernels forward (four for few heads), four backward, one to decode.

`prepare.py` couples the tokens of a chunk, `scan.py` carries the state along and reads it;
`reverse_scan.py`, `query_gradients.py` and `key_gradients.py` go back; `cut.py` and `carry.py` let
the pieces of a sequence be walked in parallel. `tiles.py` is what they share, `launch.py` how they
are launched, `autograd.py` in what order. `decode.py` is the serving step.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward, Gradients
from gdn.problem import Call, Problem, Step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Backend):
    """NVIDIA GPUs from Ampere on. With TRITON_INTERPRET=1 set before Triton is imported, the same
    kernels run on a CPU, slowly, for tests and for learning, and stay out of "auto"."""

    name = "triton"
    summary = "our Triton kernels"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        packages=("triton",),
        devices=("cpu",) if INTERPRETED else ("cuda",),
        min_sm=None if INTERPRETED else 80,
        max_k=256,
        max_v=256,
        cuda_graph=not INTERPRETED,
        decode=(torch.float32, torch.bfloat16),
    )
    priority = None if INTERPRETED else 300

    def path(self, problem: Problem) -> str:
        return "interpreter" if INTERPRETED else "Triton"

    def __init__(self, plan: Any = None) -> None:
        self.plan = plan

    def bind(self, call: Call | Step) -> TritonBackend:
        if isinstance(call, Step):
            from .decode import StepPlan

            return TritonBackend(StepPlan(call))
        from .autograd import Plan

        return TritonBackend(Plan(call))

    def saved_like(self, call: Call) -> list[Tensor]:
        from .autograd import saved_shapes

        return [call.q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(call)]

    def forward(self, call: Call, save: bool) -> Forward:
        found: Forward = self.plan.forward(call, save)
        return found

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        found: Gradients = self.plan.backward(call, saved, grad_o, grad_final_state)
        return found

    def decode(self, step: Step) -> Tensor:
        o: Tensor = self.plan.decode(step)
        return o


BACKEND = TritonBackend()
