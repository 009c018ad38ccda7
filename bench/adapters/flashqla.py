"""FlashQLA 0.1.3 (github.com/QwenLM/FlashQLA) as a backend: TileLang kernels, forward and
backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Forward, Gradients, Plan
from gdn.problem import Call, Problem, Step

ARCHITECTURES = (90, 100, 103, 120, 121)
OPTIONS = ("q", "k", "v", "g", "beta", "scale", "initial_state", "cu_seqlens", "state_v_first")


def _arguments(call: Call) -> dict[str, Any]:
    return {name: getattr(call, name) for name in OPTIONS}


class FlashQLA(Backend):
    """Its public entry without gradients, the forward and backward pair behind it with them.

    It speaks the op's own language (natural-log gates, both state layouts, states in float32), so
    nothing is converted; its L2 norm is PyTorch code under torch.compile. How it cuts a sequence,
    and so the shapes of what forward keeps, is its own affair: no `saved_like`, and no
    torch.compile around this adapter.
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
            known = ", ".join(f"sm_{sm}" for sm in ARCHITECTURES)
            return [f"needs one of {known}, got sm_{problem.sm}"]
        return []

    def path(self, problem: Problem) -> str:
        normed = "use_qk_l2norm_in_kernel" in problem.flags
        return "TileLang, L2 norm by torch.compile" if normed else "TileLang"

    def plan(self, call: Call | Step) -> Plan:
        return FlashQLAPlan()


class FlashQLAPlan(Plan):
    """Nothing is worked out ahead."""

    def forward(self, call: Call, save: bool) -> Forward:
        import flash_qla

        arguments = _arguments(call) | {"output_final_state": call.output_final_state}
        if not save:
            normed = {"use_qk_l2norm_in_kernel": call.use_qk_l2norm_in_kernel}
            return Forward(*flash_qla.chunk_gated_delta_rule(**arguments, **normed), [])
        norms = []
        if call.use_qk_l2norm_in_kernel:
            from flash_qla.utils import l2norm_fwd

            (q, q_scale), (k, k_scale) = l2norm_fwd(call.q), l2norm_fwd(call.k)
            norms = [q, k, q_scale, k_scale]
            arguments |= {"q": q, "k": k}
        g, A, o, _, state, cache = flash_qla.chunk_gated_delta_rule_fwd(
            **arguments, enable_fwd_cp_cache=True, is_train=True
        )
        kept = [cache.h0, cache.mt, cache.fallback_bwd, cache.num_warmup_bwd] if cache else []
        return Forward(o, state, [g, A, *norms, *kept])

    def backward(
        self, call: Call, saved: list[Tensor], grad_o: Tensor, grad_final_state: Tensor | None
    ) -> Gradients:
        import flash_qla
        from flash_qla.ops.gated_delta_rule.chunk.cp.preprocess import CPCache
        from flash_qla.utils import l2norm_bwd

        (g, A), rest = saved[:2], saved[2:]
        norms, kept = (rest[:4], rest[4:]) if call.use_qk_l2norm_in_kernel else ([], rest)
        names = ("h0", "mt", "fallback_bwd", "num_warmup_bwd")
        q, k = norms[:2] if norms else (call.q, call.k)
        dq, dk, dv, dbeta, dg, dstate = flash_qla.chunk_gated_delta_rule_bwd(
            **_arguments(call) | {"q": q, "k": k, "g": g},
            A=A,
            do=grad_o.contiguous(),
            dht=None if grad_final_state is None else grad_final_state.contiguous(),
            cp_cache=CPCache(**dict(zip(names, kept, strict=True))) if kept else None,
        )
        if norms:
            dq, dk = l2norm_bwd(q, norms[2], dq), l2norm_bwd(k, norms[3], dk)
        found = (dq, dk, dv, dg, dbeta, dstate, None, None)
        pairs = zip(call.differentiable, found, strict=True)
        return Gradients(*(x if like is None else x.to(like.dtype) for like, x in pairs))
