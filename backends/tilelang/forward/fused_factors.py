"""The factors of a chunk's tokens in `fused.py`, by its gate warp, and the norms of q, by its norm
warp. `fused_intra_chunk.py` names the rows of factors."""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.definition import L2_EPS
from gdn.problem import CHUNK as C

from ..tile.gate_math import load_gates, sum_gates
from ..tile.indexing import SEQUENCE, SLOT, START, STOP
from ..tile.layout import BETA, KS_FACTOR, QS_FACTOR, S_FACTOR, U_FACTOR, G
from .block_inverse import bound_strengths
from .fused_intra_chunk import (
    EXPONENT,
    FROM,
    M_FACTOR,
    P_FACTOR,
    SQUARES,
    STRENGTH,
    SUM,
    TO_M,
)
from .fused_memory import CHUNKS, HEAD, KEY_HEAD, parity_of, stage_of
from .kept import Kept, keeps_norms
from .query_norms import sum_squares
from .warp_blocks import BLOCK


@T.macro
def compute_token_factors(smem: Any, s: Any, lane: Any) -> None:
    """The factors of two tokens a lane, but for rk and those that the next function computes."""
    at = T.alloc_local((3,), "float32")  # G, e^{G - R_(a-1)}, beta
    for n in T.unroll(2):
        token = lane * 2 + n
        at[0] = smem.gates[0, G, token]
        at[2] = smem.gates[0, BETA, token]
        smem.scan_factors[s, U_FACTOR, token] = T.exp2(smem.gates[0, G, C - 1] - at[0])
        at[1] = T.exp2(at[0])
        smem.scan_factors[s, KS_FACTOR, token] = -at[1]
        if token == C - 1:
            smem.scan_factors[s, S_FACTOR, 0] = at[1]
        if token >= BLOCK:
            at[1] = T.exp2(at[0] - smem.gates[0, G, token // BLOCK * BLOCK - 1])
        smem.tokens[s, SUM, token] = at[0]
        smem.tokens[s, EXPONENT, token] = at[0]
        smem.tokens[s, FROM, token] = T.exp2(
            smem.gates[0, G, token // BLOCK * BLOCK + BLOCK - 1] - at[0]
        )
        smem.tokens[s, STRENGTH, token] = at[2]
        smem.tokens[s, M_FACTOR, token] = -at[2]
        smem.tokens[s, TO_M, token] = -at[2] * at[1]


@T.macro
def compute_query_factors(
    smem: Any, s: Any, scale: Any, left: Any, lane: Any, l2: bool, task: Any, chunk: Any,
    kept: Kept | None,
) -> None:  # fmt: skip
    """The factors of two tokens a lane that have rq, from the sums of squares of q. They keep rq
    and, where there is no L2 norm, rk: 1 past the end, since q may hold anything there. left: live
    tokens from the chunk's first one on."""
    factor = T.alloc_local((1,), "float32")  # scale rq
    for n in T.unroll(2):
        token = lane * 2 + n
        factor[0] = 1.0
        if l2:
            factor[0] = T.rsqrt(smem.tokens[s, SQUARES, token] + L2_EPS)
        if kept is not None:  # noqa: SIM102, known before the kernel is; the next is not
            if keeps_norms(task, kept):
                for which in T.unroll(1 if l2 else 2):
                    kept.norms[task[SLOT] + chunk, task[KEY_HEAD], which, token] = T.if_then_else(
                        token < left, factor[0], 1.0
                    )
        factor[0] *= scale
        smem.scan_factors[s, QS_FACTOR, token] = -smem.scan_factors[s, KS_FACTOR, token] * factor[0]
        smem.tokens[s, P_FACTOR, token] = factor[0]


@T.macro
def compute_factors(
    task: Any, first: Any, g: Any, beta: Any, A_log: Any, dt_bias: Any, smem: Any,
    norms_ready: Any, tokens_ready: Any, o_ready: Any, scale: Any, lane: Any, varlen: bool,
    l2: bool, gate: bool, bias: bool, sigmoid: bool, double: bool, output: bool, chooses: bool,
    kept: Kept | None,
) -> None:  # fmt: skip
    """The gate warp; for `for_each_task`. chooses: whether the bound of strengths is wanted."""
    raw = T.alloc_local((6,), "float32")
    batch = 0 if varlen else task[SEQUENCE]
    for chunk in T.serial(task[CHUNKS]):
        s, parity = stage_of(first, chunk, smem.stages), parity_of(first, chunk, smem.stages)
        token, left = task[START] + chunk * C, task[STOP] - task[START] - chunk * C
        load_gates(g, beta, A_log, dt_bias, batch, task[HEAD], token, left, raw, lane, gate, bias)
        sum_gates(raw, left, smem.gates, 0, lane, gate, bias, sigmoid, double)
        T.sync_warp()
        T.barrier_wait(o_ready[s], parity ^ 1)
        compute_token_factors(smem, s, lane)
        if chooses:
            smem.strengths[s] = bound_strengths(T.address_of(smem.tokens[s, STRENGTH, 0]), lane)
        if output:
            if l2:
                T.barrier_wait(norms_ready[s], parity)
            compute_query_factors(smem, s, scale, left, lane, l2, task, chunk, kept)
        T.barrier_arrive(tokens_ready[s])
        T.sync_warp()


@T.macro
def compute_norms(task: Any, first: Any, smem: Any, ready: Any, norms_ready: Any) -> None:
    """The norm warp; for `for_each_task`."""
    for chunk in T.serial(task[CHUNKS]):
        s = stage_of(first, chunk, smem.stages)
        T.barrier_wait(ready[s], parity_of(first, chunk, smem.stages))
        sum_squares(smem.q, s, T.address_of(smem.tokens[s, SQUARES, 0]))
        T.barrier_arrive(norms_ready[s])
