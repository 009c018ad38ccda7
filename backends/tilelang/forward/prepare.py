"""Forward, stage 1: all that needs no state, for every chunk and value head.

`intra_chunk.py` has the equations. A slot is the number of a chunk.

    reads   q, k [B, L, H, K]; g, beta [B, L, HV]
    writes  P_A_v [slots, HV, 2, C, C]: P and A_v
            scan_factors [slots, HV, 4, C], float32: what `scan` multiplies by (`tile/layout.py`)
            for backward (save): norms [slots, H, 2, C], float32: rq and rk, once a q/k head;
            A_out [slots, HV, C, C]: A

Thread block: one warpgroup, four on an SM. Warp 0 issues the TMA copies, warp 1 computes
the gates, all four compute the matrices, 16 rows each. An item is a chunk and a value head. A
thread block takes item after item, `heads_at_once` value heads of a q/k head in a row, so that k is
loaded and the norms are computed once for all of them. It loads the next k and q as soon as their
place is free: k after its two products, q once P, which takes q's place, has been copied to memory.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE
from ..tile.gate_math import load_gates, sum_gates
from ..tile.indexing import Fields, locate_piece, strided
from ..tile.largest import largest
from ..tile.layout import BETA, BLOCKS_PER_SM, KEY_SQUARES, QS_FACTOR, SCALE_RQ, G
from ..tile.ragged_rows import clear_past_end
from .block_inverse import LIMIT, begin_inverse, bound_strengths, choose_parts, solve_row
from .block_inverse import PRELUDE as INVERSE_PRELUDE
from .intra_chunk import (
    IntraChunkFragments,
    IntraChunkSmem,
    compute_k_factors,
    compute_k_norm,
    compute_M,
    compute_P,
    compute_q_norm,
)
from .row_norms import PRELUDE as NORMS_PRELUDE
from .row_norms import sum_squares

ITEM = (
    "sequence", "token", "live", "chunk", "slot", "head_block", "heads_left", "head", "key_head"
)  # fmt: skip
"""Fields of an item. sequence, token (the chunk's first) and live (tokens from there to the end of
the sequence) are what `locate_piece` writes. chunk counts the chunks of the launch, head_block the
blocks of `heads_at_once` value heads, heads_left the heads of the block that are not done."""
PRELUDES = PRELUDE + NORMS_PRELUDE + INVERSE_PRELUDE


@T.macro
def clear_before_products(x: Any, live: Any) -> None:
    clear_past_end(x, live)
    T.fence_proxy_async()
    T.sync_threads(1, 128)


@kernel(own_barriers=True)
def prepare(
    *, dtype: str, gates: str, strengths: str, offsets: str, K: int, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, save: bool, unchecked: bool = False,
) -> Any:  # fmt: skip
    """Build the kernel. gates, strengths, offsets: dtypes of g, beta and cu_seqlens; unchecked:
    cu_seqlens may hold anything."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots = T.dynamic("slots")
    min_parts, max_parts = choose_parts(dtype, l2, sigmoid, double)

    @T.macro
    def locate_item(item, first_chunk, span, heads_at_once, cu_seqlens, sequences, group):
        """From the chunk and the head block, find the first item of the block."""
        item["heads_left"] = heads_at_once
        item["head"] = item.head_block * heads_at_once
        item["key_head"] = item.head // group
        sequence = item.chunk // span
        item["slot"] = sequence * T.ceildiv(L, C) + first_chunk + item.chunk - sequence * span
        locate_piece(item.slot, cu_seqlens, sequences, L, C, item.array, varlen, unchecked)

    @T.macro
    def advance_item(
        item, first_chunk, span, heads_at_once, cu_seqlens, sequences, head_blocks, group, ctas
    ):
        """To the next value head; after the last one of a block, to the thread block's next block,
        which is `ctas` blocks further."""
        item["heads_left"] -= 1
        item["head"] += 1
        if item.heads_left == 0:
            item["head_block"] += ctas % head_blocks
            item["chunk"] += ctas // head_blocks
            if item.head_block >= head_blocks:
                item["head_block"] -= head_blocks
                item["chunk"] += 1
            locate_item(item, first_chunk, span, heads_at_once, cu_seqlens, sequences, group)

    @T.macro
    def load_item_gates(g, beta, A_log, dt_bias, item, raw, lane):
        batch = 0 if varlen else item.sequence
        load_gates(
            g, beta, A_log, dt_bias, batch, item.head, item.token, item.live, raw, lane,
            gate, bias,
        )  # fmt: skip

    @T.macro
    def load_rows(x, item, x_smem, ready):
        """The chunk's rows of q or k, by one warp."""
        batch = 0 if varlen else item.sequence
        T.tma_copy(
            x[batch, item.token : item.token + C, item.key_head, :], x_smem[0, :, :], barrier=ready,
            leader_scope_threads=32,
        )  # fmt: skip
        T.barrier_arrive(ready)

    @T.prim_func
    def prepare_kernel(
        q: strided("q", (B, L, H, K), dtype), k: strided("k", (B, L, H, K), dtype),
        g: strided("g", (B, L, HV), gates), beta: strided("beta", (B, L, HV), strengths),
        A_log: T.Tensor((HV,), "float32"), dt_bias: T.Tensor((HV,), "float32"),
        cu_seqlens: T.Tensor((N + 1,), offsets), P_A_v: T.Tensor((slots, HV, 2, C, C), dtype),
        scan_factors: T.Tensor((slots, HV, 4, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"),
        A_out: T.Tensor((slots, HV, C, C), dtype), sequences: T.int32, chunks: T.int32,
        first_chunk: T.int32, span: T.int32, ctas: T.int32, heads_at_once: T.int32,
        scale: T.float32,
    ):  # fmt: skip
        """chunks: how many in all; span: how many of each sequence, from first_chunk on (of a
        whole call: all of them, as if there were one sequence); ctas: thread blocks."""
        with T.Kernel(ctas, threads=128, prelude=PRELUDES) as cta:
            T.annotate_min_blocks_per_sm(BLOCKS_PER_SM)
            smem, frag = IntraChunkSmem(K, dtype, max_parts), IntraChunkFragments(dtype)
            inv = smem.inverse
            bound = T.alloc_var("float32")  # of |M_ij|
            item, next_item = (Fields(*ITEM) for _ in range(2))
            raw_gates = T.alloc_local((6,), "float32")
            k_loads = T.alloc_local((1,), "int32")  # loads of k that were waited for
            k_ready, q_ready = T.alloc_barrier(32), T.alloc_barrier(32)
            tx = T.get_thread_binding()
            warp, lane = tx // 32, tx % 32
            head_blocks = HV // heads_at_once
            items = T.ceildiv(chunks * head_blocks - cta, ctas) * heads_at_once

            # === the first item: its loads and gates ===
            next_item["chunk"] = cta // head_blocks
            next_item["head_block"] = cta % head_blocks
            locate_item(next_item, first_chunk, span, heads_at_once, cu_seqlens, sequences, HV // H)
            k_loads[0] = 0
            if warp == 0:
                load_rows(k, next_item, smem.k, k_ready)
                load_rows(q, next_item, smem.q, q_ready)
            if warp == 1:
                load_item_gates(g, beta, A_log, dt_bias, next_item, raw_gates, lane)
                sum_gates(
                    raw_gates, next_item.live, smem.gates, 0, lane, gate, bias, sigmoid, double
                )
            for i, j in T.Parallel(C, C):
                smem.A_v[0, i, j] = 0
            T.sync_threads(1, 128)
            for n in T.serial(items):
                b = n % 2
                for i in T.unroll(len(ITEM)):
                    item.array[i] = next_item.array[i]
                slot, head, key_head, live = item.slot, item.head, item.key_head, item.live
                first_head = item.heads_left == heads_at_once  # k and the norms are new
                more = n + 1 < items
                advance_item(
                    next_item, first_chunk, span, heads_at_once, cu_seqlens, sequences,
                    head_blocks, HV // H, ctas,
                )  # fmt: skip

                # === k k^T; the norms of k and the factors that need no q; M ===
                if first_head:
                    T.barrier_wait(k_ready, k_loads[0] % 2)
                    k_loads[0] += 1
                    if live < C:
                        clear_before_products(smem.k, live)
                T.wgmma_gemm(
                    smem.k[0, :, :], smem.k[0, :, :], frag.M, transpose_B=True, clear_accum=True
                )
                if (l2 or min_parts < max_parts) and first_head:
                    sum_squares(
                        smem.k, warp * 16,
                        T.address_of(smem.token_factors[KEY_SQUARES, warp * 16]), lane,
                    )  # fmt: skip
                    T.sync_warp()
                if lane < 16:
                    if first_head:
                        compute_k_norm(smem, norms, slot, key_head, warp * 16 + lane, l2, save)
                    compute_k_factors(smem, b, scan_factors, slot, head, warp * 16 + lane, l2)
                T.sync_threads(1, 128)
                if warp == 1 and more:  # after the product: it would wait for loads before it
                    load_item_gates(g, beta, A_log, dt_bias, next_item, raw_gates, lane)
                compute_M(smem, frag, b, warp)

                # === the diagonal blocks of A; the norms of q; the next gates ===
                bound = 0
                if min_parts < max_parts:
                    bound = bound_strengths(T.address_of(smem.gates[b, BETA, 0]), lane)
                    if not l2:
                        bound *= largest(T.address_of(smem.token_factors[KEY_SQUARES, 0]))
                if bound > LIMIT:
                    begin_inverse(max_parts, frag.M, inv, warp, lane)
                else:
                    begin_inverse(min_parts, frag.M, inv, warp, lane)
                if live < C:
                    T.barrier_wait(q_ready, b)
                    clear_before_products(smem.q, live)
                if l2 and first_head:
                    T.barrier_wait(q_ready, b)
                    sum_squares(
                        smem.q, warp * 16, T.address_of(smem.token_factors[SCALE_RQ, warp * 16]),
                        lane,
                    )  # fmt: skip
                    T.sync_warp()
                if lane < 16:
                    token = warp * 16 + lane
                    if first_head:
                        compute_q_norm(smem, norms, slot, key_head, token, scale, l2, save)
                    scan_factors[slot, head, QS_FACTOR, token] = (
                        T.exp2(smem.gates[b, G, token]) * smem.token_factors[SCALE_RQ, token]
                    )
                if warp == 1 and more:
                    sum_gates(
                        raw_gates, next_item.live, smem.gates, b ^ 1, lane, gate, bias, sigmoid,
                        double,
                    )  # fmt: skip
                T.fence_proxy_async()
                T.sync_threads(1, 128)

                # === q k^T; P, and to memory ===
                T.barrier_wait(q_ready, b)
                T.wgmma_gemm(
                    smem.q[0, :, :], smem.k[0, :, :], frag.P, transpose_B=True, clear_accum=True
                )
                T.wait_wgmma(0)
                T.sync_threads(1, 128)
                if warp == 0 and more and next_item.heads_left == heads_at_once:
                    load_rows(k, next_item, smem.k, k_ready)
                compute_P(smem, frag, b, warp, tx)
                if warp == 0:
                    T.tma_store_wait(0)  # A_v of the item before has left
                T.fence_proxy_async()
                T.sync_threads(1, 128)
                if warp == 0:
                    T.tma_copy(
                        smem.P[0, :, 0:C], P_A_v[slot, head, 0, :, :], leader_scope_threads=32
                    )

                # === the rest of A, and A_v, to memory ===
                strength = T.address_of(smem.gates[b, BETA, 0])
                A_v = T.address_of(smem.A_v[0, 0, 0])
                A = [T.address_of(A_out[slot, head, 0, 0])] if save else []
                if bound > LIMIT:
                    solve_row(max_parts, inv, strength, A_v, warp, lane, dtype, *A)
                else:
                    solve_row(min_parts, inv, strength, A_v, warp, lane, dtype, *A)
                T.fence_proxy_async()
                if warp == 0:
                    T.tma_store_wait(0)  # P has left q's place
                    if more:
                        load_rows(q, next_item, smem.q, q_ready)
                T.sync_threads(1, 128)
                if warp == 0:
                    T.tma_copy(
                        smem.A_v[0, :, :], P_A_v[slot, head, 1, :, :], leader_scope_threads=32
                    )
            if warp == 0:
                T.tma_store_wait(0)

    return prepare_kernel
