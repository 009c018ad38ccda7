"""FlashQLA 0.1.3 (github.com/QwenLM/FlashQLA) as a backend, with forward and backward. Its kernels
are in TileLang."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward, Gradients, Plan
from gdn.problem import Call, PoolCall, Problem

ARCHITECTURES = (90, 100, 103, 120, 121)
ARGUMENTS = ("q", "k", "v", "g", "beta", "scale", "initial_state", "cu_seqlens", "state_v_first")


def _arguments(call: Call) -> dict[str, Any]:
    return {name: getattr(call, name) for name in ARGUMENTS}


class FlashQLA(Backend):
    """Without gradients this calls FlashQLA's public function, and with gradients the forward and
    backward functions below it.

    No argument is converted: FlashQLA takes natural-log gates, both state layouts, and states in
    float32. Its L2 norm is PyTorch code under torch.compile.
    """

    name = "flashqla"
    summary = "FlashQLA 0.1.3, TileLang kernels"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16),
        packages=("flash_qla", "tilelang"),
        devices=("cuda",),
        min_sm=90,
        max_sm=121,
        head_dims=(128,),
        gva=True,
        varlen=True,
        initial_state=True,
        backward=True,
        cuda_graph=True,
        flags=frozenset({"output_final_state", "use_qk_l2norm_in_kernel", "state_v_first"}),
    )

    def unsupported(self, problem: Problem) -> list[str]:
        if problem.sm not in ARCHITECTURES:
            supported = ", ".join(f"sm_{sm}" for sm in ARCHITECTURES)
            return [f"needs one of {supported}, got sm_{problem.sm}"]
        return []

    def path(self, problem: Problem) -> str:
        l2_norm = "use_qk_l2norm_in_kernel" in problem.flags
        return "TileLang, L2 norm by torch.compile" if l2_norm else "TileLang"

    def saved_like(self, call: Call) -> None:
        """FlashQLA decides by itself how to cut a sequence, and what forward saves depends on
        it."""

    def plan(self, call: Call | PoolCall) -> Plan:
        return FlashQLAPlan()


class FlashQLAPlan(Plan):
    """The plan of every call. It prepares nothing."""

    def forward(self, call: Call, save: bool) -> Forward:
        import flash_qla

        arguments = _arguments(call) | {"output_final_state": call.output_final_state}
        if not save:
            arguments["use_qk_l2norm_in_kernel"] = call.use_qk_l2norm_in_kernel
            o, state = flash_qla.chunk_gated_delta_rule(**arguments)
            return Forward(o, state, [])
        norms = []
        if call.use_qk_l2norm_in_kernel:
            from flash_qla.utils import l2norm_fwd

            (q, q_scale), (k, k_scale) = l2norm_fwd(call.q), l2norm_fwd(call.k)
            norms = [q, k, q_scale, k_scale]
            arguments |= {"q": q, "k": k}
        g, A, o, _, state, cache = flash_qla.chunk_gated_delta_rule_fwd(
            **arguments, enable_fwd_cp_cache=True, is_train=True
        )
        cached = [cache.h0, cache.mt, cache.fallback_bwd, cache.num_warmup_bwd] if cache else []
        return Forward(o, state, [g, A, *norms, *cached])

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        import flash_qla
        from flash_qla.ops.gated_delta_rule.chunk.cp.preprocess import CPCache
        from flash_qla.utils import l2norm_bwd

        (g, A), rest = saved[:2], saved[2:]
        norms, cached = (rest[:4], rest[4:]) if call.use_qk_l2norm_in_kernel else ([], rest)
        cache_fields = ("h0", "mt", "fallback_bwd", "num_warmup_bwd")
        q, k = norms[:2] if norms else (call.q, call.k)
        dq, dk, dv, dbeta, dg, dstate = flash_qla.chunk_gated_delta_rule_bwd(
            **_arguments(call) | {"q": q, "k": k, "g": g},
            A=A,
            do=grad_o.contiguous(),
            dht=None if grad_final_state is None else grad_final_state.contiguous(),
            cp_cache=CPCache(**dict(zip(cache_fields, cached, strict=True))) if cached else None,
        )
        if norms:
            dq, dk = l2norm_bwd(q, norms[2], dq), l2norm_bwd(k, norms[3], dk)
        gradients = (dq, dk, dv, dg, dbeta, dstate, None, None)
        pairs = zip(call.differentiable, gradients, strict=True)
        return Gradients(*(dx if x is None else dx.to(x.dtype) for x, dx in pairs))
