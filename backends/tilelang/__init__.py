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

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Plan
from gdn.problem import FLAGS, Call, Problem, Step


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
        gva=True,
        varlen=True,
        initial_state=True,
        backward=True,
        deterministic=True,
        cuda_graph=True,
        resets=True,
        flags=frozenset(FLAGS),
        decode=(torch.float32, torch.bfloat16),
        speculative=True,
    )
    priority = 400

    def unavailable(self) -> str | None:
        """Also where there is no nvcc, which compiles the kernels."""
        return super().unavailable() or (None if _has_nvcc() else "no nvcc, of CUDA 12 or newer")

    def path(self, problem: Problem) -> str:
        return "TileLang"

    def saved_like(self, call: Call) -> list[Tensor]:
        from .forward.plan import saved_shapes

        return [call.q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(call)]

    def plan(self, call: Call | Step) -> Plan:
        if isinstance(call, Step):
            from .decode.kernel import DecodePlan

            return DecodePlan(call)
        from .plan import PrefillPlan

        return PrefillPlan(call)


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
