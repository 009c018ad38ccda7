"""Our Triton port: two kernels forward (four for few heads), four backward, one to decode.

`prepare.py` couples the tokens of a chunk, `scan.py` carries the state along and reads it;
`reverse_scan.py`, `query_gradients.py` and `key_gradients.py` go back; `cut.py` and `carry.py` let
the pieces of a sequence be walked in parallel. `tiles.py` is what they share, `launch.py` how they
are launched, `autograd.py` in what order. `decode.py` is the serving step.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Plan
from gdn.problem import FLAGS, Call, Problem, Step

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
        gva=True,
        varlen=True,
        initial_state=True,
        backward=True,
        deterministic=True,
        cuda_graph=not INTERPRETED,
        resets=True,
        flags=frozenset(FLAGS),
        decode=(torch.float32, torch.bfloat16),
        speculative=True,
    )
    priority = None if INTERPRETED else 300

    def path(self, problem: Problem) -> str:
        return "interpreter" if INTERPRETED else "Triton"

    def saved_like(self, call: Call) -> list[Tensor]:
        from .plan import saved_shapes

        return [call.q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(call)]

    def plan(self, call: Call | Step) -> Plan:
        if isinstance(call, Step):
            from .decode import DecodePlan

            return DecodePlan(call)
        from .plan import PrefillPlan

        return PrefillPlan(call)


BACKEND = TritonBackend()
