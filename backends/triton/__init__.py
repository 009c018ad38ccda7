"""Our Triton port: two kernels forward, three backward (one of them forward's scan again).

`prepare.py` couples the tokens of a chunk, `scan.py` carries the state along and reads it;
`reverse_scan.py` and `gradients.py` go back. `tiles.py` is what they share, `launch.py` how they
are launched, `autograd.py` in what order.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward, Gradients
from gdn.problem import Call, Problem

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
    )
    priority = None if INTERPRETED else 300

    def path(self, problem: Problem) -> str:
        return "interpreter" if INTERPRETED else "Triton"

    def saved_like(self, call: Call) -> list[Tensor]:
        from .autograd import saved_like

        return saved_like(call)

    def forward(self, call: Call, save: bool) -> Forward:
        from .autograd import forward

        return forward(call, save)

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        from .autograd import backward

        return backward(call, saved, grad_o, grad_final_state)


BACKEND = TritonBackend()
