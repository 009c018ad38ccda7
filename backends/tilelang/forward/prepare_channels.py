"""Forward, stage 1 with a decay per channel: all that needs no state, for every chunk and value
head.

    rq, rk = 1 / sqrt(sum x^2 + 1e-6) over the rows of q and k if the L2 norm is fused, else 1
    M_ij = beta_i rk_i rk_j pairs(k, k)_ij                             [C, C]
    A = (I + M)^-1,  A_v = A diag(beta)                                [C, C]
    P_ij = scale rq_i rk_j pairs(q, k)_ij,  P_ii = scale rq_i rk_i q_i.k_i
    Q_in = scale rq e^G * Q,  K_in = rk e^G * K,  K_out = rk e^{gamma - G} * K    [C, K]

with G the running sum of g, gamma its last value, and e^G, e^{gamma - G} and the decays of pairs
products of e^g (`channel_pairs.py`). With these `scan` computes

    U = A_v (V - K_in S),   O = Q_in S + P U,   S <- e^gamma * S + K_out^T U

where e^gamma scales the rows of S. A slot is the number of a chunk.

    reads   q, k [B, L, H, K]; g [B, L, HV, K]; beta [B, L, HV]
    writes  P_A_v [slots, HV, 2, C, C]: P and A_v
            decayed_rows [slots, HV, 3, C, K]: Q_in, K_in and K_out. In float16 each row is divided
            by its scale, the largest power of two in it
            scan_factors [slots, HV, 3 + K / C, C], float32: the scales, with the sign that `scan`
            needs, and e^gamma (`tile/layout.py`)
            P_A [slots, HV, 2, C, C] if backward follows: P and A

Backward runs the kernel again for the rows and their factors alone, with beta, rq and rk, and for
`chunk_spans` [slots, 2] as `gate_sums` has them.

Thread block: a chunk and a value head; two on an SM (one in float16). Of its two warpgroups the
first multiplies for P, the other one for M and A. A thread has two channels of K / 8 tokens.
"""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.definition import L2_EPS
from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE as FRAGMENTS
from ..tile.gate_math import fused_log_decay, fused_strength
from ..tile.indexing import Fields, locate_piece, strided
from ..tile.largest import largest
from ..tile.layout import S_FACTOR, factor_rows, token_rows
from .block_inverse import (
    LIMIT,
    BlockInverseSmem,
    begin_inverse,
    bound_strengths,
    choose_parts,
    solve_row,
)
from .block_inverse import PRELUDE as INVERSE_PRELUDE
from .channel_pairs import (
    FAR,
    NEAR,
    add_level,
    join_blocks,
    join_halves,
    put_diagonal,
    put_level,
    put_matrix,
)
from .decayed_rows import PRELUDE as ROWS_PRELUDE
from .decayed_rows import put_decayed_rows
from .near_pairs import PRELUDE as PAIRS_PRELUDE
from .near_pairs import add_near_pairs, look_for_fast_decay
from .row_norms import PRELUDE as NORMS_PRELUDE
from .row_norms import sum_squares

ITEM = ("sequence", "token", "live", "slot", "head", "key_head")
"""What a thread block has: the first three as `locate_piece` writes them."""
PRELUDES = FRAGMENTS + NORMS_PRELUDE + INVERSE_PRELUDE + PAIRS_PRELUDE + ROWS_PRELUDE
ROW_Q, ROW_M, COLUMN, ONE = range(4)
"""Rows of `token_factors` [4, C]: scale rq, beta rk, rk, and 1."""


class ChannelSmem:
    """Shared memory of a chunk."""

    def __init__(self, K: int, dtype: str, parts: int, max_parts: int, rows_alone: bool) -> None:
        self.q, self.k = (T.alloc_shared((1, C, K), dtype) for _ in range(2))
        self.totals = T.alloc_shared((C * 8 // K, K), "float32")
        self.beta, self.squares = (T.alloc_shared((n, C), "float32") for n in (1, 2))
        self.token_factors = T.alloc_shared((ONE + 1, C), "float32")
        self.largest = T.alloc_shared((3, K // 64, C), "float32")
        if rows_alone:
            return
        self.q_rows, self.k_rows, self.k_left = (
            T.alloc_shared((parts, C, K), "bfloat16") for _ in range(3)
        )
        self.fast = T.alloc_shared((8,), "uint32")
        self.inverse = BlockInverseSmem(max_parts)
        self.P, self.A_v = (T.alloc_shared((1, C, C), dtype) for _ in range(2))
        T.annotate_layout({x: make_full_bank_swizzled_layout(x) for x in (self.P, self.A_v)})


@kernel(own_barriers=True)
def prepare_channels(
    *, dtype: str, gates: str, strengths: str, offsets: str, K: int, V: int, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, A_log: bool, lower_bound: float | None,
    save: bool, rows_alone: bool, unchecked: bool = False,
) -> Any:  # fmt: skip
    """Build the kernel. gates, strengths, offsets: dtypes of g, beta and cu_seqlens; save: also
    write P_A; rows_alone: for backward, without P, A, A_v; unchecked: cu_seqlens holds anything."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots, spans = T.dynamic("slots"), T.dynamic("spans")
    tokens, parts = K // 8, 2 if dtype == "float16" else 1
    min_parts, max_parts = choose_parts(dtype, l2, sigmoid, double)
    has_A_log, factor_count = A_log, factor_rows(K, channels=True) + (3 if rows_alone else 0)

    @T.macro
    def load_decays(g, A_log, dt_bias, item, head, first, pair, prefix):
        """e^g of the thread's tokens and channels; 1 past the end of the sequence."""
        raw, added = T.alloc_local((2 * tokens,), gates), T.alloc_local((2,), "float32")
        batch = 0 if varlen else item.sequence
        for i in T.unroll(tokens):
            for c in T.vectorized(2):
                raw[2 * i + c] = 0
            if first + i < item.live:
                at = T.cast(item.token + first + i, "int64")
                for c in T.vectorized(2):
                    raw[2 * i + c] = g[batch, at, head, 2 * pair + c]
        for c in T.unroll(2):
            added[c] = dt_bias[head, 2 * pair + c] if bias else 0.0
        for i in T.unroll(tokens):
            for c in T.unroll(2):
                x = T.cast(raw[2 * i + c], "float32")
                if bias:
                    x = x + added[c]
                if gate:
                    x = fused_log_decay(x, A_log[head] if has_A_log else T.float32(0), lower_bound)
                prefix[2 * i + c] = T.if_then_else(first + i < item.live, T.exp(x), 1.0)

    @T.macro
    def load_rows(x, item, key_head, x_smem, ready):
        """The chunk's rows of q or k, by one warp."""
        batch = 0 if varlen else item.sequence
        T.tma_copy(
            x[batch, item.token : item.token + C, key_head, :], x_smem[0, :, :], barrier=ready,
            leader_scope_threads=32,
        )  # fmt: skip

    @T.macro
    def compute_token_factors(beta, scan_factors, item, head, smem, scale, token):
        """The factors of one token, from the sums of squares of its rows."""
        strength = T.alloc_local((1,), "float32")
        batch = 0 if varlen else item.sequence
        strength[0] = 0.0
        if token < item.live:
            strength[0] = T.cast(beta[batch, item.token + token, head], "float32")
            if sigmoid:
                strength[0] = fused_strength(strength[0], double)
        rq = T.rsqrt(smem.squares[0, token] + L2_EPS) if l2 else T.float32(1)
        rk = T.rsqrt(smem.squares[1, token] + L2_EPS) if l2 else T.float32(1)
        smem.beta[0, token] = strength[0]
        smem.token_factors[ROW_Q, token] = scale * rq
        smem.token_factors[ROW_M, token] = strength[0] * rk
        smem.token_factors[COLUMN, token] = rk
        smem.token_factors[ONE, token] = 1.0
        if rows_alone:
            beta_row, rq_row, rk_row = token_rows(K)
            scan_factors[item.slot, head, beta_row, token] = strength[0]
            scan_factors[item.slot, head, rq_row, token] = rq
            scan_factors[item.slot, head, rk_row, token] = rk

    @T.prim_func
    def prepare_channels_kernel(
        q: strided("q", (B, L, H, K), dtype), k: strided("k", (B, L, H, K), dtype),
        g: T.Tensor((B, L, HV, K), gates), beta: strided("beta", (B, L, HV), strengths),
        A_log: T.Tensor((HV,), "float32"), dt_bias: T.Tensor((HV, K), "float32"),
        cu_seqlens: T.Tensor((N + 1,), offsets), P_A_v: T.Tensor((slots, HV, 2, C, C), dtype),
        scan_factors: T.Tensor((slots, HV, factor_count, C), "float32"),
        decayed_rows: T.Tensor((slots, HV, 3, C, K), dtype),
        P_A: T.Tensor((slots, HV, 2, C, C), dtype), chunk_spans: T.Tensor((spans, 2), "int32"),
        sequences: T.int32, chunks: T.int32, first_chunk: T.int32, span: T.int32, scale: T.float32,
    ):  # fmt: skip
        """chunks: how many in all; span: how many of each sequence, from first_chunk on (of a
        whole call: all of them, as if there were one sequence)."""
        with T.Kernel(chunks * HV, threads=256, prelude=PRELUDES) as cta:
            T.annotate_min_blocks_per_sm(2 if rows_alone else 3 - parts)
            smem, item = ChannelSmem(K, dtype, parts, max_parts, rows_alone), Fields(*ITEM)
            prefix, suffix = (T.alloc_local((2 * tokens,), "float32") for _ in range(2))
            sums, rows = (T.alloc_local((32,), "float32") for _ in range(2))
            bound = T.alloc_var("float32")  # of |M_ij|
            ready = T.alloc_barrier(32)
            tx = T.get_thread_binding()
            warp, lane, row = tx // 32, tx % 32, tx // 32 % 4
            first, pair = tx // (K // 2) * tokens, tx % (K // 2)

            # === the chunk; loads; e^g ===
            item["head"] = cta % HV
            item["key_head"] = item.head // (HV // H)
            item["slot"] = cta // HV  # the chunk, counted over all of the launch
            sequence = item.slot // span
            item["slot"] = sequence * T.ceildiv(L, C) + first_chunk + item.slot - sequence * span
            locate_piece(item.slot, cu_seqlens, sequences, L, C, item.array, varlen, unchecked)
            slot, head, key_head, live = item.slot, item.head, item.key_head, item.live
            if rows_alone and varlen and tx == 0 and head == 0:
                chunk_spans[slot, 0] = item.token
                chunk_spans[slot, 1] = live
            if warp == 0:
                load_rows(q, item, key_head, smem.q, ready)
                load_rows(k, item, key_head, smem.k, ready)
                T.barrier_arrive(ready)
            load_decays(g, A_log, dt_bias, item, head, first, pair, prefix)
            for i in T.unroll(2 * tokens):
                suffix[i] = 1.0
            if not rows_alone:
                for i, j in T.Parallel(C, C):
                    smem.A_v[0, i, j] = 0
            T.barrier_wait(ready, 0)
            if live < C:
                for i, j in T.Parallel(C, K):
                    if i >= live:
                        smem.q[0, i, j] = 0
                        smem.k[0, i, j] = 0
                T.sync_threads()

            # === norms ===
            if not rows_alone:
                look_for_fast_decay(K, smem, prefix, tx, lower_bound)
            if warp < 4:
                sum_squares(smem.q, row * 16, T.address_of(smem.squares[0, row * 16]), lane)
            else:
                sum_squares(smem.k, row * 16, T.address_of(smem.squares[1, row * 16]), lane)
            T.sync_threads()
            if tx < C:
                compute_token_factors(beta, scan_factors, item, head, smem, scale, tx)

            # === pairs; rows for the scan ===
            factors = [T.address_of(smem.token_factors[n, 0]) for n in range(ONE + 1)]
            if not rows_alone:
                for i in T.unroll(32):
                    sums[i] = 0.0
                add_near_pairs(K, parts, smem, prefix, suffix, sums, tx, lower_bound)
            for h in NEAR + FAR if rows_alone else FAR:
                T.sync_threads()
                if not rows_alone:
                    put_level(h, K, parts, smem, prefix, suffix)
                join_halves(h, K, smem, prefix, suffix, tx)
                if h == FAR[-1]:  # before the last products, which need the factors' registers
                    rows_of = [factors[n] for n in (ROW_Q, COLUMN, COLUMN)]
                    to = (decayed_rows, scan_factors, slot, head)
                    put_decayed_rows(K, smem, prefix, suffix, rows_of, *to)
                    if first == C - tokens:
                        for c in T.unroll(2):
                            scan_factors[slot, head, S_FACTOR + 2 * pair // C, 2 * pair % C + c] = (
                                prefix[2 * tokens - 2 + c]
                            )
                if not rows_alone:
                    T.sync_threads()
                    add_level(h, K, parts, smem, sums)

            # === P ===
            if rows_alone:
                pass
            elif warp < 4:
                join_blocks(sums, factors[ROW_Q], factors[COLUMN], rows, row)
                put_diagonal(K, smem, factors[ROW_Q], factors[COLUMN], rows, row)
                put_matrix(rows, factors[ONE], smem.P, row)
                T.fence_proxy_async()
                T.sync_threads(1, 128)
                if warp == 0:
                    T.tma_copy(smem.P[0, :, :], P_A_v[slot, head, 0, :, :], leader_scope_threads=32)
                    if save:
                        T.tma_copy(
                            smem.P[0, :, :], P_A[slot, head, 0, :, :], leader_scope_threads=32
                        )
                    T.tma_store_wait(0)
            # === M and A ===
            else:
                join_blocks(sums, factors[ROW_M], factors[COLUMN], rows, row)
                strength = T.address_of(smem.beta[0, 0])
                A_v = T.address_of(smem.A_v[0, 0, 0])
                A = [T.address_of(P_A[slot, head, 1, 0, 0])] if save else []
                bound = 0
                if min_parts < max_parts:
                    bound = bound_strengths(strength, lane)
                    if not l2:
                        bound *= largest(T.address_of(smem.squares[1, 0]))
                if bound > LIMIT:
                    begin_inverse(max_parts, rows, smem.inverse, row, lane)
                else:
                    begin_inverse(min_parts, rows, smem.inverse, row, lane)
                T.sync_threads(2, 128)
                if bound > LIMIT:
                    solve_row(max_parts, smem.inverse, strength, A_v, row, lane, dtype, *A)
                else:
                    solve_row(min_parts, smem.inverse, strength, A_v, row, lane, dtype, *A)
                T.fence_proxy_async()
                T.sync_threads(2, 128)
                if warp == 4:
                    T.tma_copy(
                        smem.A_v[0, :, :], P_A_v[slot, head, 1, :, :], leader_scope_threads=32
                    )
                    T.tma_store_wait(0)

    return prepare_channels_kernel
