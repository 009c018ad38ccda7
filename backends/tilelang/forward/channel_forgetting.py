"""`forgetting.py` with a decay per channel.

A token multiplies the state by (I - beta k k^T) diag(e^g), whose norm is at most the largest e^g of
its channels times max(1, |1 - beta |k|^2|). Keys mix the channels, so the largest one counts at
every token. Over a chunk the sum of these is at least the sum of any one channel, which
`prepare_channels` has found: only where the largest of those reaches -60 are g and keys read.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.definition import GATE_FLOOR
from gdn.problem import CHUNK as C

from ..tile.gate_math import fused_log_decay, fused_strength
from ..tile.indexing import SEQUENCE, SLOT, START, STOP
from ..tile.largest import largest
from ..tile.layout import BETA, LOG2_E, S_FACTOR
from .forgetting import ROWS_AT_ONCE, channel_of, load_rows, sum_growth, sum_lanes, token_of
from .fused_memory import HEAD, KEY_HEAD


@T.macro
def sum_largest_channel(
    scan_factors: Any, slot: Any, head: Any, sums: Any, warp: Any, lane: Any, K: int
) -> None:
    """sums[warp] = log2 of the largest e^gamma of a chunk."""
    found = T.alloc_var("float32")
    found = 0.0
    for row in T.unroll(K // C):
        found = T.max(found, largest(T.address_of(scan_factors[slot, head, S_FACTOR + row, 0])))
    if lane == 0:
        sums[warp] = T.log2(found)


@T.macro
def sum_slowest(
    g: Any, A_log: Any, dt_bias: Any, batch: Any, token: Any, left: Any, head: Any, total: Any,
    lane: Any, gate: bool, bias: bool, has_A_log: bool, lower_bound: float | None,
) -> None:  # fmt: skip
    """Add the largest g of each of the 64 tokens from `token` on to total[0], some by each lane;
    eight lanes read a row. NaN stays. The fused gate falls with what it is computed of, so it is
    computed once a token. Tokens past the `left` ones of the piece add nothing."""
    K, run = g.shape[3], 128 // g.dtype.bits
    rows = T.alloc_local((ROWS_AT_ONCE * K // 8,), g.dtype)
    x, least = (T.alloc_local((1,), "float32") for _ in range(2))
    undefined = T.alloc_local((1,), "int32")
    for step in T.serial(C // (4 * ROWS_AT_ONCE)):
        load_rows(g, batch, token, left, head, rows, step, lane)
        for n in T.unroll(ROWS_AT_ONCE):
            least[0] = T.infinity("float32")
            undefined[0] = 0
            for i in T.unroll(K // 8):
                x[0] = T.cast(rows[n * (K // 8) + i], "float32")
                if bias:
                    x[0] += dt_bias[head, channel_of(run, i, lane)]
                if not gate:
                    x[0] = -x[0]
                least[0] = T.min(least[0], x[0])
                # not x == x, which TileLang takes for true
                undefined[0] = T.if_then_else(x[0] <= T.infinity("float32"), undefined[0], 1)
            for power in T.unroll(3):
                least[0] = T.min(least[0], T.shfl_xor(least[0], 1 << power))
                undefined[0] = T.max(undefined[0], T.shfl_xor(undefined[0], 1 << power))
            if T.And(lane % 8 == 0, token_of(step, n, lane) < left):
                if gate:
                    x[0] = fused_log_decay(
                        least[0], A_log[head] if has_A_log else T.float32(0), lower_bound
                    )
                else:
                    x[0] = -least[0]
                x[0] = T.if_then_else(x[0] < GATE_FLOOR, GATE_FLOOR, x[0])  # NaN stays
                total[0] += x[0] * LOG2_E
                if undefined[0] != 0:
                    total[0] = T.log2(T.float32(-1))  # NaN


@T.macro
def sum_channel_bounds(
    exact: Any, chunk: Any, k: Any, g: Any, beta: Any, A_log: Any, dt_bias: Any,
    scan_factors: Any, smem: Any, task: Any, warp: Any, lane: Any, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, has_A_log: bool,
    lower_bound: float | None,
) -> None:  # fmt: skip
    """For `search`: the sum of a chunk, or with exact = 0 that of its largest channel."""
    batch = 0 if varlen else task[SEQUENCE]
    token = task[START] + chunk * C
    left = task[STOP] - token
    if exact == 0:
        sum_largest_channel(
            scan_factors, task[SLOT] + chunk, task[HEAD], smem.sums, warp, lane, g.shape[3]
        )
    else:
        mine = T.alloc_local((1,), "float32")
        for i in T.unroll(2):
            t = lane * 2 + i
            smem.gates[warp, BETA, t] = 0.0
            if t < left:
                mine[0] = T.cast(beta[batch, token + t, task[HEAD]], "float32")
                if sigmoid:
                    mine[0] = fused_strength(mine[0], double)
                smem.gates[warp, BETA, t] = mine[0]
        T.sync_warp()
        mine[0] = 0.0
        sum_slowest(
            g, A_log, dt_bias, batch, token, left, task[HEAD], mine, lane, gate, bias, has_A_log,
            lower_bound,
        )  # fmt: skip
        sum_growth(k, batch, token, left, task[KEY_HEAD], smem, mine, warp, lane, l2)
        sum_lanes(mine, 32)
        if lane == 0:
            smem.sums[warp] = mine[0]
