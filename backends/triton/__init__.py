"""Our Triton port: three kernels forward, four backward (one of them forward's scan again).

`prepare.py` couples the tokens of a chunk, `scan.py` carries the state along, `output.py` reads it;
`reverse_scan.py` and `gradients.py` go back. `tiles.py` is what they share, `autograd.py` launches
them.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward, Gradients
from gdn.problem import Call


class TritonBackend(Backend):
    """So far proved under Triton's interpreter alone, and offered there alone: set
    TRITON_INTERPRET=1 before Triton is imported. Not part of "auto" until measured on a GPU."""

    name = "triton"
    summary = "our Triton kernels; so far under the interpreter alone"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        packages=("triton",),
        devices=("cpu",),
        max_k=256,
        max_v=256,
        cuda_graph=False,
    )

    def unavailable(self) -> str | None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "runs under Triton's interpreter alone so far: set TRITON_INTERPRET=1"
        return super().unavailable()

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
