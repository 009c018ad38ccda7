"""FlashInfer 0.7.2 (github.com/flashinfer-ai/flashinfer) as a backend, for prefill and decode. Its
kernels are in the CuTe DSL."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward
from gdn.problem import Call, PoolCall, Problem, Step

from .converting import ConvertingPlan

FUSED = {"use_gate_in_kernel", "use_beta_sigmoid_in_kernel"}
ARCHITECTURES = (90, 100, 103, 120, 121)


class FlashInfer(Backend):
    """Prefill is `flashinfer.gdn_prefill.chunk_gated_delta_rule`. It takes packed tokens, the decay
    instead of its logarithm, and states [V, K].

    Decode is `flashinfer.gdn_decode.gated_delta_rule_decode_pretranspose`. It takes raw gates in
    q's dtype, and applies gate and sigmoid itself. From bfloat16 states it writes skipped rows to
    slot 0, which the op must not touch. So this adapter declares float32 states alone.

    Neither has a backward.
    """

    name = "flashinfer"
    summary = "FlashInfer 0.7.2, CuTe DSL kernels"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16),
        packages=("flashinfer", "cutlass"),
        devices=("cuda",),
        min_sm=90,
        max_sm=121,
        head_dims=(128,),
        gva=True,
        varlen=True,
        initial_state=True,
        cuda_graph=True,
        decode=(torch.float32,),
        flags=frozenset({"output_final_state", "use_qk_l2norm_in_kernel", "state_v_first"} | FUSED),
    )

    def unsupported(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.sm not in ARCHITECTURES:
            supported = ", ".join(f"sm_{sm}" for sm in ARCHITECTURES)
            reasons.append(f"needs one of {supported}, got sm_{problem.sm}")
        if problem.pool is None:
            return reasons + [f"{flag} is for decode" for flag in sorted(FUSED & problem.flags)]
        if not problem.flags >= FUSED:
            reasons.append(f"decode needs {' and '.join(sorted(FUSED))}")
        if "state_v_first" not in problem.flags:
            reasons.append("decode needs state_v_first, since states are updated in place")
        if problem.T != 1 or problem.varlen:
            reasons.append("decode takes one token a sequence, not packed")
        return reasons

    def path(self, problem: Problem) -> str:
        if problem.pool is not None:
            return "CuTe DSL, gates rounded to q's dtype"
        transposed = "" if "state_v_first" in problem.flags else ", states transposed"
        return f"CuTe DSL, decay exp(g){transposed}"

    def plan(self, call: Call | PoolCall) -> FlashInferPlan:
        return FlashInferPlan()


@functools.cache
def _gates() -> Any:
    """The decay and beta of raw gates, in one kernel."""

    def compute(
        g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        g = g.float() if dt_bias is None else g.float() + dt_bias
        decay = torch.exp(-torch.exp(A_log.float()) * torch.nn.functional.softplus(g))
        return decay, torch.sigmoid(beta.float())

    return torch.compile(compute, dynamic=True)


def prefill_on_pool(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, state: Tensor,
    state_indices: Tensor, cu_seqlens: Tensor, A_log: Tensor, dt_bias: Tensor | None = None,
    **options: object,
) -> Tensor:  # fmt: skip
    """`gdn.gated_delta_net_prefill` with everything fused and states [V, K], by FlashInfer: the
    copies that it needs of slices, the gates, its L2 norm and its kernel."""
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    decay, strength = _gates()(g[0], beta[0], A_log, dt_bias)
    o, _ = chunk_gated_delta_rule(
        *(x[0].contiguous() for x in (q, k, v)), decay, strength, initial_state=state,
        output_final_state=True, output_state=state, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=True, state_indices=state_indices,
    )  # fmt: skip
    return o[None]  # type: ignore[no-any-return]


class FlashInferPlan(ConvertingPlan):
    """The plan of every call."""

    def convert(self, call: Call) -> dict[str, Any]:
        """The call's tensors as FlashInfer takes them."""
        B, T = call.q.shape[:2]
        cu_seqlens, state = call.cu_seqlens, call.initial_state
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=call.q.device)
        if state is not None and not call.state_v_first:
            state = state.mT.contiguous()
        tokens = {"q": call.q, "k": call.k, "v": call.v, "beta": call.beta.float()}
        tokens["g"] = call.g.float().exp()
        return {name: x.flatten(0, 1).contiguous() for name, x in tokens.items()} | {
            "initial_state": state,
            "cu_seqlens": cu_seqlens,
        }

    def restore(self, call: Call, state: Tensor) -> Tensor:
        """FlashInfer's final state as the op returns it."""
        return state if call.state_v_first else state.mT.contiguous()

    def forward(self, call: Call, save: bool) -> Forward:
        from flashinfer.gdn_prefill import chunk_gated_delta_rule

        o, state = chunk_gated_delta_rule(
            **self.converted(call),
            scale=call.scale,
            output_final_state=True,
            use_qk_l2norm_in_kernel=call.use_qk_l2norm_in_kernel,
        )
        return Forward(o.view(call.v.shape), self.restore(call, state), [])

    def decode(self, step: Step) -> Tensor:
        from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose

        call, slots = step.call, step.state_indices
        if slots is not None and step.null_index != -1:
            slots = torch.where(slots == step.null_index, -1, slots)
        pool = {"state": None, "initial_state": step.state, "initial_state_indices": slots}
        A_log, dt_bias = call.A_log, call.dt_bias
        assert A_log is not None  # the gate is fused
        dt_bias = torch.zeros_like(A_log) if dt_bias is None else dt_bias
        o: Tensor
        o, _ = gated_delta_rule_decode_pretranspose(
            *(x.contiguous() for x in (call.q, call.k, call.v)),
            **({"state": step.state} if slots is None else pool),
            A_log=A_log.float(),
            a=call.g.to(call.q.dtype),
            dt_bias=dt_bias.float(),
            b=call.beta.to(call.q.dtype),
            scale=call.scale,
            use_qk_l2norm=call.use_qk_l2norm_in_kernel,
        )
        if step.out is not None:
            return step.out.copy_(o)
        return o
