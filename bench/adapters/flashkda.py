"""FlashKDA (github.com/MoonshotAI/FlashKDA) as a backend: forward with a bounded decay per channel.
Its kernels are in CUTLASS."""

from __future__ import annotations

from typing import Any

import torch

from gdn.backend import Backend, Capabilities, Forward
from gdn.problem import Call, PoolCall, Problem

from .converting import ConvertingPlan

FUSED = {"use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"}
LEAST_BOUND = -5.0


class FlashKDA(Backend):
    """`flash_kda.fwd`, which takes raw gates and beta in bfloat16, and as many heads of q and k as
    of v. It has no backward."""

    name = "flashkda"
    summary = "FlashKDA, CUTLASS kernels"
    capabilities = Capabilities(
        dtypes=(torch.bfloat16,),
        packages=("flash_kda",),
        devices=("cuda",),
        min_sm=90,
        max_sm=90,
        head_dims=(128,),
        varlen=True,
        initial_state=True,
        cuda_graph=True,
        per_channel=True,
        gate_lower_bound=True,
        flags=frozenset({"output_final_state", "state_v_first"} | FUSED),
    )

    def unsupported(self, problem: Problem) -> list[str]:
        reasons = []
        if not problem.per_channel or problem.gate_lower_bound is None:
            reasons.append("needs a decay per channel with gate_lower_bound")
        elif problem.gate_lower_bound < LEAST_BOUND:
            reasons.append(f"gate_lower_bound must be at least {LEAST_BOUND}")
        if not problem.flags >= FUSED | {"state_v_first"}:
            reasons.append(f"needs {', '.join(sorted(FUSED | {'state_v_first'}))}")
        return reasons

    def path(self, problem: Problem) -> str:
        return "CUTLASS, gates and beta rounded to bfloat16"

    def plan(self, call: Call | PoolCall) -> FlashKDAPlan:
        return FlashKDAPlan()


class FlashKDAPlan(ConvertingPlan):
    """The plan of every call."""

    def convert(self, call: Call) -> dict[str, Any]:
        """The call's gates, beta and bounds of sequences as FlashKDA takes them."""
        bounds = call.cu_seqlens
        return {
            "g": call.g.bfloat16(),
            "beta": call.beta.bfloat16(),
            "cu_seqlens": None if bounds is None else bounds.long(),
            "initial_state": call.initial_state,
        }

    def forward(self, call: Call, save: bool) -> Forward:
        import flash_kda

        assert call.A_log is not None
        o = torch.empty_like(call.v)
        state = torch.empty(call.state_shape, dtype=torch.float32, device=o.device)
        dt_bias = call.dt_bias
        if dt_bias is None:
            dt_bias = torch.zeros(call.g.shape[2:], device=o.device)
        flash_kda.fwd(
            call.q,
            call.k,
            call.v,
            scale=call.scale,
            out=o,
            A_log=call.A_log,
            dt_bias=dt_bias.view(call.g.shape[2:]),
            lower_bound=call.gate_lower_bound,
            final_state=state,
            **self.converted(call),
        )
        return Forward(o, state, [])
