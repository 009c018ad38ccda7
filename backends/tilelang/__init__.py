"""Our TileLang kernels for Hopper: two forward and four backward, of which few heads launch two
again and `carry`, and one to decode.

`prepare.py` couples the tokens of every chunk, by itself; `scan.py` then carries the states along
and reads them; `carry.py` lets the pieces of a sequence be walked at the same time.
`couple.py`, `inverse.py`, `squares.py`, `feed.py` and `advance.py` are what their warps do,
`forward.py` is their order.
`gates.py`, `states.py`, `reverse_scan.py` and `gradients.py` go back (with `reverse_memory.py`,
`gradient_memory.py`, `through_states.py`, `within_chunk.py`, `per_token.py`, `sums.py` and
`transposed.py`), in the order of `backward.py` and the rounds of `rounds.py`.
`decode.py` and `part.py` are the serving step. `launch.py` is how a kernel is compiled.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from typing import Any

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward, Gradients
from gdn.problem import Call, Problem, Step


class TileLangBackend(Backend):
    """Hopper alone: its asynchronous products, copies and barriers are what the kernels use."""

    name = "tilelang"
    summary = "our TileLang kernels"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16),
        packages=("tilelang",),
        devices=("cuda",),
        min_sm=90,
        max_sm=90,
        head_dims=(64, 128),
        decode=(torch.float32, torch.bfloat16),
    )
    priority = 400

    def __init__(self, plan: Any = None) -> None:
        self.plan = plan
        self.back: Any = None

    def unavailable(self) -> str | None:
        """Also where there is no nvcc, which compiles the kernels."""
        return super().unavailable() or (None if _has_nvcc() else "no nvcc, of CUDA 12 or newer")

    def path(self, problem: Problem) -> str:
        return "TileLang"

    def bind(self, call: Call | Step) -> TileLangBackend:
        if isinstance(call, Step):
            from .decode import StepPlan

            return TileLangBackend(StepPlan(call))
        from .forward import Plan

        return TileLangBackend(Plan(call))

    def _backward(self, call: Call) -> Any:
        """What backward calls have in common; its kernels are not read before they are needed."""
        if self.back is None:
            from .backward import Backward

            self.back = Backward(call)
        return self.back

    def warm(self, call: Call | Step, backward: bool) -> None:
        if isinstance(call, Step):
            self.plan.run(self.plan.wide)
            return
        self.plan.kernels(save=backward)
        if backward:
            for final in {False, call.output_final_state}:
                self._backward(call).kernels(call.initial_state is not None, final)

    def saved_like(self, call: Call) -> list[Tensor]:
        from .forward import saved_shapes

        return [call.q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(call)]

    def forward(self, call: Call, save: bool) -> Forward:
        found: Forward = self.plan.forward(call, save)
        return found

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        back = self._backward(call)
        found: Gradients = back.backward(call, saved, grad_o, grad_final_state)
        return found

    def decode(self, step: Step) -> Tensor:
        o: Tensor = self.plan.decode(step)
        return o


def _has_nvcc() -> bool:
    """Whether nvcc is where TileLang looks for it."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = (shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes if home)
    return (
        any(found)
        or shutil.which("nvcc") is not None
        or os.path.exists("/usr/local/cuda/bin/nvcc")
        or any(d.name.lower() == "nvidia-cuda-nvcc" for d in importlib.metadata.distributions())
    )


BACKEND = TileLangBackend()
