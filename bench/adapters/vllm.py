"""vLLM 0.33.0's chunked prefill (github.com/vllm-project/vllm) as a backend. Its kernels are a fork
of fla's, in Triton, and need no compiled part of vLLM."""

from __future__ import annotations

import torch

from gdn.backend import Backend, Capabilities, Forward, Plan
from gdn.problem import Call, PoolCall, Problem


class VLLM(Backend):
    """`chunk_gated_delta_rule` of vLLM's third_party/flash_linear_attention. It takes finished
    gates and states [V, K], and has no backward. The L2 norm is a kernel of its own. The server
    gathers states before it and scatters them after it, which is not part of this call.

    Decode is not here: its kernels skip slot 0, which other backends may use.
    """

    name = "vllm"
    summary = "vLLM 0.33.0, its fork of fla's Triton kernels"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16),
        packages=("vllm", "triton"),
        devices=("cuda",),
        min_sm=80,
        gva=True,
        varlen=True,
        initial_state=True,
        flags=frozenset({"output_final_state", "use_qk_l2norm_in_kernel", "state_v_first"}),
    )

    def unsupported(self, problem: Problem) -> list[str]:
        states = problem.initial_state or "output_final_state" in problem.flags
        if states and "state_v_first" not in problem.flags:
            return ["states must be [N, HV, V, K], got [N, HV, K, V]; pass state_v_first=True"]
        return []

    def path(self, problem: Problem) -> str:
        return "Triton, chunks of 64"

    def plan(self, call: Call | PoolCall) -> Plan:
        return VLLMPlan()


class VLLMPlan(Plan):
    """The plan of every call. It prepares nothing."""

    def forward(self, call: Call, save: bool) -> Forward:
        from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule

        o, state = chunk_gated_delta_rule(
            *(x.contiguous() for x in call[:5]),
            scale=call.scale,
            initial_state=call.initial_state,
            output_final_state=call.output_final_state,
            cu_seqlens=call.cu_seqlens,
            use_qk_l2norm_in_kernel=call.use_qk_l2norm_in_kernel,
        )
        return Forward(o, state if call.output_final_state else None, [])
