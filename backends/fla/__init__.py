"""flash-linear-attention 0.6 behind the common contract: an adapter, which adds no arithmetic of
its own."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Plan
from gdn.problem import FLAGS, Call, PoolCall, Problem


class FlaBackend(Backend):
    """Calls fla-core's chunked gated delta rule. Three engines can answer inside fla, and `path`
    says which:

    - its own Triton kernels;
    - in backward on Hopper, one TileLang kernel in place of a Triton one that Triton 3.4 to 3.7.0
      miscompiles;
    - FlashQLA, where installed, for calls without gradients, if FLA_FLASH_QLA=1 asks for it (fla's
      own default is on; gdn otherwise calls past it, so that "fla" means fla).

    A decay per channel goes to its Kimi Delta Attention, `chunk_kda` and `fused_recurrent_kda`: its
    Triton kernels, and in backward one TileLang kernel where tilelang is installed and HV = H.
    FlashKDA never answers.

    fla also accepts float32, but multiplies it as TF32 (10 bits of mantissa), which is not what
    gdn promises for float32; so it is not offered here.
    """

    name = "fla"
    summary = "flash-linear-attention 0.6, Triton kernels"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16),
        packages=("fla", "triton", "einops"),
        devices=("cuda",),
        min_sm=80,
        max_k=256,
        gva=True,
        varlen=True,
        initial_state=True,
        backward=True,
        deterministic=True,
        cuda_graph=True,
        flags=frozenset(FLAGS),
        decode=(torch.float32, torch.bfloat16, torch.float16),
        output_states=True,
        prefill=(torch.float32, torch.bfloat16, torch.float16),
        per_channel=True,
        gate_lower_bound=True,
    )
    priority = 200

    def unsupported(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.gate_lower_bound is not None and not problem.per_channel:
            reasons.append("gate_lower_bound needs a decay per channel (g [B, T, HV, K])")
        if problem.needs_grad and (problem.K % 2 or problem.V % 2):
            reasons.append(f"backward needs even K and V, got K = {problem.K}, V = {problem.V}")
        if _takes_tilelang_channels(problem) and min(problem.K, problem.V) <= 16:
            reasons.append(
                "backward with a decay per channel needs K and V above 16 where fla takes its "
                f"TileLang kernel (FLA_TILELANG not 0), got K = {problem.K}, V = {problem.V}"
            )
        if (  # by fla's own rule, which does not concern the kernels for a decay per channel
            problem.needs_grad
            and not problem.per_channel
            and problem.sm == 90
            and not _tilelang_part()
            and _triton_miscompiles()
        ):
            reasons.append(
                "backward on Hopper is wrong with Triton 3.4 to 3.7.0, and fla refuses it, "
                "unless tilelang and nvcc are installed (FLA_TILELANG not 0)"
            )
        return reasons

    def path(self, problem: Problem) -> str:
        if problem.pool is not None:
            return "Triton, states gathered and scattered"
        if problem.per_channel:
            engines = "Triton + TileLang" if _takes_tilelang_channels(problem) else "Triton"
            return f"{engines}, {'bounded' if is_safe(problem) else 'any'} gates"
        if _takes_flash_qla(problem):
            return "FlashQLA"
        return "Triton + TileLang" if problem.needs_grad and _tilelang_part() else "Triton"

    def saved_like(self, call: Call) -> list[Tensor]:
        from . import channels, prefill

        return channels.saved_like(call) if call.per_channel else prefill.saved_like(call)

    def plan(self, call: Call | PoolCall) -> Plan:
        from .plan import FlaPlan

        return FlaPlan()


def _tilelang_part() -> bool:
    """Whether fla hands part of backward to TileLang here, by its own rules."""
    from fla.ops.common.backends.tilelang import CommonTileLangBackend

    part = CommonTileLangBackend()
    return bool(part.is_available() and part.is_enabled())


def _takes_tilelang_channels(problem: Problem) -> bool:
    """Whether part of a backward with a decay per channel runs in TileLang."""
    backward = problem.needs_grad and problem.per_channel and problem.H == problem.HV
    return backward and _tilelang_channels()


def _tilelang_channels() -> bool:
    """Whether fla hands part of Kimi Delta Attention's backward to TileLang here, by its own
    rules."""
    from fla.ops.kda.backends.tilelang import KDATileLangBackend

    part = KDATileLangBackend()
    return bool(part.is_available() and part.is_enabled())


def is_safe(call: Call | Problem) -> bool:
    """Whether fla may take the faster kernel for gates that are at least -5 (its safe_gate). That
    kernel does not compile for K below 16."""
    K = call.K if isinstance(call, Problem) else call.q.shape[3]
    return call.gate_lower_bound is not None and call.gate_lower_bound >= -5 and K >= 16


def _triton_miscompiles() -> bool:
    from fla.utils import TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1

    return bool(TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1)


def _takes_flash_qla(problem: Problem) -> bool:
    """Whether fla would hand this call to FlashQLA, by fla's rules and gdn's (asked for, no
    gradients)."""
    if os.environ.get("FLA_FLASH_QLA", "0") == "0" or problem.needs_grad:
        return False
    from fla.ops.gated_delta_rule.backends import FlashQLABackend

    fused = {"use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"} & problem.flags
    return bool(
        FlashQLABackend.is_available()
        and problem.sm in (90, 100, 103, 120)
        and problem.dtype in (torch.float16, torch.bfloat16)
        and (problem.sm, problem.dtype) != (120, torch.float16)
        and problem.K == problem.V == 128
        and not fused
    )


BACKEND = FlaBackend()
