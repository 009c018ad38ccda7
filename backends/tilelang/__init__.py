"""Our TileLang kernels for Hopper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward
from gdn.problem import Call, Problem, Step


class TileLangBackend(Backend):
    """Hopper alone: its asynchronous tensor cores, copies and barriers are what the kernels are made
    of."""

    name = "tilelang"
    summary = "our TileLang kernels"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16),
        packages=("tilelang",),
        devices=("cuda",),
        min_sm=90,
        max_sm=90,
        head_dims=(64, 128),
        backward=False,
    )
    priority = 400

    def __init__(self, plan: Any = None) -> None:
        self.plan = plan

    def path(self, problem: Problem) -> str:
        return "TileLang"

    def bind(self, call: Call | Step) -> TileLangBackend:
        from .forward import Plan

        return TileLangBackend(Plan(call))

    def saved_like(self, call: Call) -> list[Tensor]:
        from .forward import saved_like

        return saved_like(call)

    def forward(self, call: Call, save: bool) -> Forward:
        found: Forward = self.plan.forward(call, save)
        return found


BACKEND = TileLangBackend()
