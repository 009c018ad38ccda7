"""TileLang kernels for Hopper GPUs. docs/kernels.md explains them and gives a reading order.

- `forward/`: `prepare` computes for all chunks in parallel what needs no state; `scan` then updates
  the state chunk by chunk and computes the outputs. `fused` does both. With a decay per channel
  `prepare_channels` takes the place of `prepare`.
- `backward/`: `gate_sums`, `recompute_states`, `reverse_scan` and `gradients`, in memory rounds
  (`memory_rounds.py`); `reverse_gradients` does the work of the last two where heads fill the GPU.
  With a decay per channel `prepare_channels` and `channel_gradients` take the places of the first
  and the last.
- `combine_pieces.py`: the states between the pieces of a sequence, for both; `clear_tail.py`: zeros
  for tokens that belong to no sequence.
- `decode/`: the serving step, a few tokens a sequence.
- `head_blocks.py`: K and V that only decode has kernels for.
- `pool_plan.py`: prefill on a pool of states, by forward's kernels; `tile/pool.py` and
  `forward/checkpoints.py` are what they do differently.
- `tile/`: building blocks that kernels share. `kernels.py`: all kernels by name; `compile.py`: how
  one is compiled.
- `launch.py`: where compiled kernels come from; `prebuilt.py`: folders of them; `build.py` and
  `catalogue.py`: `gdn build-kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Plan
from gdn.problem import FLAGS, Call, PoolCall, Prefill, Problem, Step

from . import prebuilt
from .head_blocks import choose_blocks
from .kernels import Job, no_compiler
from .launch import describe_sources, missing, missing_reason, unloaded


class TileLangBackend(Backend):
    """Runs on Hopper only: the kernels use its WGMMA products, TMA copies and barriers."""

    name = "tilelang"
    summary = "our TileLang kernels"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16),
        packages=("tilelang",),
        devices=("cuda",),
        min_sm=90,
        max_sm=90,
        head_dims=(64, 96, 128, 192, 256),
        max_k=128,
        gva=True,
        varlen=True,
        initial_state=True,
        backward=True,
        deterministic=True,
        cuda_graph=True,
        resets=True,
        flags=frozenset(FLAGS),
        decode=(torch.float32, torch.bfloat16, torch.float16),
        speculative=True,
        output_states=True,
        prefill=(torch.float32, torch.bfloat16, torch.float16),
        checkpoints=True,
        per_channel=True,
        gate_lower_bound=True,
        context_parallel=True,
        batch_invariant=True,
    )
    priority = 400

    def unavailable(self) -> str | None:
        """Kernels need TileLang's runtime, and either a compiler or a folder of kernels. TileLang
        itself is imported only to compile, so it is not looked for as a module."""
        if reason := prebuilt.runtime_missing():
            return reason
        reason = no_compiler()
        if reason is None or any(prebuilt.folders()):
            return None
        return f"{reason}, and no prebuilt kernels (the distribution gdn-kernels-cu13)"

    def unprepared(self, call: Call | PoolCall, backward: bool) -> list[str]:
        """Without a compiler every kernel of the call must load from a folder. The reason names
        what `gdn.warmup` wants, which may be more: a server's next step has another size."""
        reason = no_compiler()
        if reason is None or not unloaded(self.jobs(call, backward)):
            return []
        return [missing_reason(missing(self.warmup_jobs(call, backward)), reason)]

    def preparation(self, call: Call | PoolCall, backward: bool) -> str:
        return describe_sources(self.jobs(call, backward))

    def jobs(self, call: Call | PoolCall, backward: bool) -> list[Job]:
        """The kernels that a call needs."""
        plan: Any = self.plan(call)
        jobs: list[Job] = plan.jobs(call, backward)
        return jobs

    def warmup_jobs(self, call: Call | PoolCall, backward: bool) -> list[Job]:
        """The kernels that `gdn.warmup` compiles: `jobs`, on a pool for any number of states."""
        plan: Any = self.plan(call)
        jobs: list[Job]
        jobs = plan.jobs(call, backward) if isinstance(call, Call) else plan.all_jobs()
        return jobs

    def unsupported(self, problem: Problem) -> list[str]:
        """Without a decay per channel there is no lower bound of the gate but in decode. Prefill on
        a pool has no blocks of heads."""
        if problem.pool is not None and not problem.prefill:
            return []
        reasons = []
        if problem.context_parallel and (why := no_compiler()):
            # which kernels are prebuilt may differ between ranks, and they must choose alike
            reasons.append(f"with context parallelism kernels are compiled, and here is {why}")
        if problem.gate_lower_bound is not None and not problem.per_channel:
            reasons.append("gate_lower_bound needs a decay per channel, except in decode")
        if problem.prefill and choose_blocks(problem.K, problem.V) is not None:
            reasons.append(f"on a pool K and V must be 64 or 128, got {problem.K} and {problem.V}")
        return reasons

    def path(self, problem: Problem) -> str:
        layout = choose_blocks(problem.K, problem.V) if problem.pool is None else None
        return f"TileLang, {layout.describe()}" if layout else "TileLang"

    def saved_like(self, call: Call) -> list[Tensor]:
        from .forward.plan import saved_shapes

        layout = choose_blocks(call.q.shape[3], call.v.shape[3])
        call = layout.of(call) if layout else call
        return [call.q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(call)]

    def exchanges(self, call: Call) -> bool:
        return choose_blocks(call.q.shape[3], call.v.shape[3]) is None

    def plan(self, call: Call | PoolCall) -> Plan:
        if isinstance(call, Step):
            from .decode.plan import DecodePlan

            return DecodePlan(call)
        if isinstance(call, Prefill):
            from .pool_plan import PoolPlan

            return PoolPlan(call)
        from .blocked_plan import BlockedPlan
        from .plan import PrefillPlan

        layout = choose_blocks(call.q.shape[3], call.v.shape[3])
        if layout is None:
            return PrefillPlan(call)
        return BlockedPlan(PrefillPlan(layout.of(call)), layout)


BACKEND = TileLangBackend()
