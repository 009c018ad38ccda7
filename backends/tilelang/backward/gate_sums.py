"""Backward, stage 1: the gates of every chunk again, and where the tokens of packed chunks lie.

    G = cumsum(g) within the chunk, natural logarithm

Computing G and beta again takes less time than forward would take to store them. A slot is the
number of a chunk in the batch; packed batches leave some slots unused.

Reads g and beta [B, L, HV]. Writes `G_beta` [slots, HV, 2, C], float32; and, of packed sequences,
`chunk_spans` [slots, 2]: the first token of a chunk, and the tokens of its sequence from there on
(0 or less: the slot is unused).

Thread block (slot, WARPS value heads): one warp a value head, two tokens a lane.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.gate_math import load_gates, sum_gates
from ..tile.indexing import Fields, locate_piece, strided
from ..tile.layout import BETA, LOG2_E, G
from .factors import Factor

WARPS = 8


@kernel(own_barriers=True)
def gate_sums(
    *, gates: str, strengths: str, offsets: str, varlen: bool, gate: bool, bias: bool,
    sigmoid: bool, double: bool,
) -> Any:  # fmt: skip
    """Build the kernel. gates, strengths, offsets: dtypes of g, beta, cu_seqlens; gate, bias,
    sigmoid, double: fused options of the call."""
    B, L, HV, N = (T.dynamic(name) for name in ("B", "L", "HV", "N"))
    slots, rows = T.dynamic("slots"), T.dynamic("rows")

    @T.prim_func
    def gate_sums_kernel(
        g: strided("g", (B, L, HV), gates), beta: strided("beta", (B, L, HV), strengths),
        A_log: T.Tensor((HV,), "float32"), dt_bias: T.Tensor((HV,), "float32"),
        cu_seqlens: T.Tensor((N + 1,), offsets), G_beta: T.Tensor((slots, HV, 2, C), "float32"),
        chunk_spans: T.Tensor((rows, 2), "int32"), sequences: T.int32,
    ):  # fmt: skip
        with T.Kernel(slots, T.ceildiv(HV, WARPS), threads=32 * WARPS) as (slot, heads):
            task = Fields("sequence", "start", "live")
            raw = T.alloc_local((6,), "float32")
            # [warps, G or beta, C]; a lane reads only what it wrote
            sums_smem = T.alloc_shared((WARPS, 2, C), "float32")
            tx = T.get_thread_binding()
            warp, lane = tx // 32, tx % 32
            head = heads * WARPS + warp
            locate_piece(slot, cu_seqlens, sequences, L, C, task.array, varlen)
            if varlen and tx == 0 and heads == 0:
                chunk_spans[slot, 0] = task.start
                chunk_spans[slot, 1] = task.live
            if head < HV:
                batch = 0 if varlen else task.sequence
                load_gates(
                    g, beta, A_log, dt_bias, batch, head, task.start, task.live, raw, lane,
                    gate, bias,
                )  # fmt: skip
                sum_gates(raw, task.live, sums_smem, warp, lane, gate, bias, sigmoid, double)
                for e in T.unroll(2):
                    i = lane * 2 + e
                    G_beta[slot, head, Factor.G, i] = sums_smem[warp, G, i] / LOG2_E
                    G_beta[slot, head, Factor.BETA, i] = sums_smem[warp, BETA, i]

    return gate_sums_kernel
