"""What forward launches before its scans: one kernel, or three for bfloat16 calls with a decay per
channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdn.problem import Call

from .channel_forward import chunk_matrices_kernel, chunk_rows_kernel
from .channel_prepare import prepare_channels_kernel
from .channel_sums import sum_gates_kernel
from .launch import Stage, prepared_channels, shared_memory_limit
from .prepare import prepare_kernel

if TYPE_CHECKING:
    from .plan import PrefillPlan


class ChannelStages:
    """Three stages, called together with the arguments of `prepare_channels_kernel`."""

    def __init__(self, sum_gates: Stage, compute_matrices: Stage, write_rows: Stage) -> None:
        self.sum_gates, self.compute_matrices = sum_gates, compute_matrices
        self.write_rows = write_rows

    def __call__(self, tensors: Sequence[Tensor | None], *scale: float) -> None:
        """Run them in their order."""
        q, k, g, beta, A_log, dt_bias, factors, matrices, decayed, decays, cu_seqlens = tensors
        self.sum_gates((g, A_log, dt_bias, factors, decayed, decays, cu_seqlens))
        self.compute_matrices((q, k, beta, factors, matrices, decayed, cu_seqlens), *scale)
        self.write_rows((q, k, factors, matrices, decayed, cu_seqlens), *scale)


FirstStage = Stage | ChannelStages


def bind_first_stage(plan: PrefillPlan, call: Call, save: bool) -> FirstStage:
    """Forward's stage before the scans. save: backward follows."""
    programs, sizes = plan.slots * plan.constants["HV"], plan.chunk_sizes
    if not call.per_channel:
        return plan.bind(prepare_kernel, programs, sizes, SAVE=save)
    if call.q.dtype != torch.bfloat16:
        limit = shared_memory_limit(plan.device)
        BD = prepared_channels(plan.constants["BK"], plan.itemsize, limit)
        return plan.bind(prepare_channels_kernel, programs, sizes, SAVE=save, BD=BD)
    return ChannelStages(
        plan.bind(sum_gates_kernel, programs, sizes),
        plan.bind(chunk_matrices_kernel, programs, sizes, SAVE=save),
        plan.bind(chunk_rows_kernel, programs, sizes),
    )
