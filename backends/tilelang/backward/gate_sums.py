"""The first stage of backward, a warp a chunk and value head: where its tokens lie, and their gates
again, which takes less time than it takes memory to keep them.

Reads g and beta; writes `factors` [slots, HV, 2, C], G and beta in float32, and, of packed
sequences, each slot's first token and how many tokens of its sequence there are from that one on.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.gate_math import load_gates, sum_gates
from ..tile.indexing import locate_piece
from ..tile.layout import BETA, LOG2_E, G

WARPS = 8


@kernel(own_barriers=True)
def gate_sums(
    *, gates: str, strengths: str, offsets: str, varlen: bool, gate: bool, bias: bool,
    sigmoid: bool, double: bool,
) -> Any:  # fmt: skip
    """See the module."""
    B, L, HV, N = (T.dynamic(name) for name in ("B", "L", "HV", "N"))
    slots, rows = T.dynamic("slots"), T.dynamic("rows")

    @T.prim_func
    def gate_sums_kernel(
        g: T.Tensor((B, L, HV), gates), beta: T.Tensor((B, L, HV), strengths),
        A_log: T.Tensor((HV,), "float32"), dt_bias: T.Tensor((HV,), "float32"),
        cu_seqlens: T.Tensor((N + 1,), offsets), factors: T.Tensor((slots, HV, 2, C), "float32"),
        spans: T.Tensor((rows, 2), "int32"), sequences: T.int32,
    ):  # fmt: skip
        with T.Kernel(slots, T.ceildiv(HV, WARPS), threads=32 * WARPS) as (slot, block):
            place = T.alloc_local((3,), "int32")
            raw = T.alloc_local((6,), "float32")
            summed = T.alloc_shared((WARPS, 2, C), "float32")  # each lane reads what it wrote
            tx = T.get_thread_binding()
            warp, lane = tx // 32, tx % 32
            head = block * WARPS + warp
            locate_piece(slot, cu_seqlens, sequences, L, C, place, varlen)
            if varlen and tx == 0 and block == 0:
                spans[slot, 0] = place[1]
                spans[slot, 1] = place[2]
            if head < HV:
                batch = 0 if varlen else place[0]
                load_gates(
                    g, beta, A_log, dt_bias, batch, head, place[1], place[2], raw, lane, gate, bias
                )
                sum_gates(raw, place[2], summed, warp, lane, gate, bias, sigmoid, double)
                for e in T.unroll(2):
                    token = lane * 2 + e
                    factors[slot, head, 0, token] = summed[warp, G, token] / LOG2_E
                    factors[slot, head, 1, token] = summed[warp, BETA, token]

    return gate_sums_kernel
