"""The plain PyTorch backend: chunked, for any device, dtype, K and V. Tests hold the kernel
backends to it."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward, Gradients, Plan
from gdn.problem import FLAGS, Call, PoolCall, Prefill, Step

from . import alone, chunk_loop
from .chunk_loop import saved_like
from .decode import decode
from .prefill import run_prefill, within_tokens


class TorchBackend(Backend):
    """`chunk_loop.py` loops over the chunks. `chunk.py` computes one, or with a decay per channel
    `channel_chunk.py`. `layout.py` gathers its tokens, and `activation.py` differentiates the fused
    options. `prefill.py` runs the loop on a pool of states, and `decode.py` takes a step.
    `alone.py` runs all of these sequence by sequence, for batch-invariant calls.

    `operand_dtype` is the dtype to which operands of matrix products are rounded. By default it is
    the call's dtype on a GPU, and the compute dtype (no rounding) elsewhere. With `rounds_inverse`
    the inverse of I + M is computed and is such an operand, as in kernels, instead of solving with
    I + M. Tests hold kernels to twice the error of this.
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
        cuda_graph=False,  # PyTorch does not promise that its triangular solve can be captured
        resets=True,
        flags=frozenset(FLAGS),
        decode=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        speculative=True,
        output_states=True,
        prefill=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        checkpoints=True,
        per_channel=True,
        gate_lower_bound=True,
        context_parallel=True,
        batch_invariant=True,
    )
    priority = 100

    def __init__(
        self, operand_dtype: torch.dtype | None = None, rounds_inverse: bool = False
    ) -> None:
        self.operand_dtype, self.rounds_inverse = operand_dtype, rounds_inverse

    def saved_like(self, call: Call) -> list[Tensor]:
        return saved_like(call)

    def plan(self, call: Call | PoolCall) -> TorchPlan:
        return TorchPlan(self.operand_dtype, self.rounds_inverse)


class TorchPlan(Plan):
    """The plan of every call. It prepares nothing."""

    def __init__(
        self, operand_dtype: torch.dtype | None = None, rounds_inverse: bool = False
    ) -> None:
        self.rounding = (operand_dtype, rounds_inverse)

    def forward(self, call: Call, save: bool) -> Forward:
        forward = alone.forward if call.batch_invariant else chunk_loop.forward
        return forward(call, save, *self.rounding)

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        backward = alone.backward if call.batch_invariant else chunk_loop.backward
        return backward(call, saved, grad_o, grad_final_state, *self.rounding)

    def decode(self, step: Step) -> Tensor:
        if not step.call.batch_invariant:
            return decode(step)
        return alone.run(step._replace(call=within_tokens(step.call)), decode)

    def prefill(self, prefill: Prefill) -> Tensor:
        def compute(part: Prefill) -> Tensor:
            return run_prefill(part, *self.rounding)

        prefill = prefill._replace(call=within_tokens(prefill.call))
        return alone.run(prefill, compute) if prefill.call.batch_invariant else compute(prefill)


BACKEND = TorchBackend()
