"""Backward, stage 4 with a decay per channel: all gradients but those of the states, by chunks.

With S the state before the chunk, dS the gradient of the state after it, a = e^G,
z = e^{gamma - G}, * elementwise, D_ij the decays between two tokens, and q, k normalised, for each
value head

    dq_i = scale a_i * (dO S^T)_i + sum_{j <= i} X_ij D_ij * k_j,       X = scale dO U^T
    right_i = -a_i * (R S^T)_i + sum_{j < i} Y_ij D_ij * k_j,           Y = -R U^T
    dk_i = beta_i right_i + z_i * (U dS^T)_i + sum_{j >= i} D_ji * X_ji q_j
           + sum_{j > i} beta_j D_ji * Y_ji k_j
    dbeta = rowsum(R * V) + rowsum(k * right)
    dg_t = sums of gradient times value over the factors that contain g_t: a_i for i >= t, D_ij for
           i >= t > j, z_j for j < t, and e^gamma

Pairs i = j and z of the last token contain no g and stay out of dg. Then follow the gradients
through the L2 norm, the sigmoid and the gate. R is the stored one, and beta R = `remaining_beta` R.
In the code dq and dk are of raw rows q, k, whose norms are in the factors of tokens.

Reads q, k, g, dO, `scan_factors`, rowsum(R * V), U^T, S^T, dS^T and, in the memory of dv, the
stored R. Writes dq, dk, dg, dbeta, dv where beta is small, and partial sums for A_log and dt_bias.
In float16 U^T and S^T are over the scales of their rows, by which it multiplies dO, R and dS.

Thread block: one on an SM, with a warpgroup for 64 channels. It takes every `thread_blocks`-th pair
of chunk and q/k head, its value heads in turn, and loads the next ones early. It sums dq and dk
over the value heads in registers, in a fixed order. `channel_entries.py` has their layout,
`channel_near_pairs.py` the sums over pairs, `channel_sums.py` all other sums.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragment_sums import PRELUDE as SUMS
from ..tile.fragments import PRELUDE as FRAGMENTS
from ..tile.gate_math import remaining_beta
from ..tile.indexing import Fields, strided
from ..tile.largest import PRELUDE as LARGEST
from ..tile.largest import largest
from ..tile.layout import ROWS
from ..tile.ragged_rows import clear_past_end
from .channel_entries import PRELUDE as CHANNEL_ENTRIES
from .channel_entries import join_all
from .channel_gates import (
    load_decays,
    put_terms,
    store_beta_gradient,
    store_gate_gradients,
    take_decays,
    take_terms,
)
from .channel_memory import (
    CHUNK_FIELDS,
    ChannelGradientsSmem,
    Registers,
    load_head,
    multiply_by_scales,
    place,
    store_rows,
    store_weak_dv,
    sum_S_dS,
)
from .channel_near_pairs import PRELUDE as CHANNEL_PAIRS
from .channel_near_pairs import add_pairs
from .channel_sums import PRELUDE as CHANNEL_SUMS
from .channel_sums import (
    add_diagonal,
    add_dO_S,
    add_e_gamma,
    add_R_S,
    add_U_dS,
    dot_rows,
    put_gradient,
    put_pairs,
    sum_channels,
    sum_from_tokens,
)
from .factors import rows_of_factors
from .gradients_memory import COLUMNS, load_rows, locate_chunk

CUDA = FRAGMENTS + SUMS + LARGEST + CHANNEL_ENTRIES + CHANNEL_PAIRS + CHANNEL_SUMS


@kernel(own_barriers=True)
def channel_gradients(
    *, dtype: str, gates: str, strengths: str, K: int, V: int, group: int, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, A_log: bool, lower_bound: float | None,
) -> Any:  # fmt: skip
    """Build the kernel. gates, strengths: dtypes of g and beta; group: HV / H; A_log: whether there
    is one; l2, gate, bias, sigmoid, double, lower_bound: fused options of the call."""
    B, L, H, HV = (T.dynamic(name) for name in ("B", "L", "H", "HV"))
    slots, spans, partial = (T.dynamic(name) for name in ("slots", "spans", "partial"))
    blocks, parts, has_A_log = K // COLUMNS, 2 if dtype == "float16" else 1, A_log
    threads = 128 * blocks
    prelude = f"constexpr int gdn_threads = {threads};\n" + CUDA

    @T.macro
    def find_head(chunk_spans, chunk, first, thread_blocks, step):
        """Find the value head that is number `step` of the thread block."""
        locate_chunk(first + step // group * thread_blocks, chunk_spans, L, H, chunk, varlen)
        chunk["head"] = chunk.key_head * group + step % group
        chunk["first"] = T.if_then_else(step % group == 0, 1, 0)
        chunk["last"] = T.if_then_else(step % group == group - 1, 1, 0)

    @T.macro
    def load_chunk(q, k, smem, ready, chunk):
        load_rows(q, smem.q, ready, chunk.batch, chunk.token, chunk.key_head)
        load_rows(k, smem.k, ready, chunk.batch, chunk.token, chunk.key_head)
        T.barrier_arrive(ready)

    @T.macro
    def find_token_factors(smem, scale, i):
        beta, rq, rk = smem.factors[0, i], smem.factors[1, i], smem.factors[2, i]
        smem.beta[i] = beta
        smem.rest[i] = remaining_beta(beta)
        smem.row_factors[0, i] = scale * rq
        smem.row_factors[1, i] = -rk
        smem.norms[0, i] = rq
        smem.norms[1, i] = rk
        smem.rv[i] = smem.RV[0, i] + smem.RV[1, i] if V == 2 * ROWS else smem.RV[0, i]

    @T.macro
    def prepare_rows(dv, smem, chunk, scale, h, x):
        """What the loaded rows need before they are multiplied."""
        thread = h * 128 + x
        store_weak_dv(smem, dv, chunk.batch, chunk.token, chunk.live, chunk.head, thread)
        if thread < C:
            find_token_factors(smem, scale, thread)
        if chunk.live < C:
            T.sync_threads()  # `store_weak_dv` reads R
            clear_past_end(smem.do_R, chunk.live)
            if chunk.first == 1:
                clear_past_end(smem.q, chunk.live)
                clear_past_end(smem.k, chunk.live)
            T.fence_proxy_async()
        if smem.scales is not None:
            top = T.alloc_var("float32")
            top = 1.0
            for row in T.unroll(V // ROWS):
                top = T.max(top, largest(T.address_of(smem.scales[row, 0])))
            if top > 1:
                T.sync_threads()
                multiply_by_scales(smem, h)
                T.fence_proxy_async()
        T.sync_threads()

    @T.macro
    def multiply_states(smem, regs, product, chunk, h, x):
        """Everything through S, dS, dO, R and U."""
        sum_S_dS(smem, h, x)
        for n in T.unroll(2 // blocks):
            T.wgmma_gemm(smem.do_R[h + n, :, :], smem.U, product, clear_accum=True)
            T.wait_wgmma(0)
            put_pairs(
                product, T.address_of(smem.row_factors[h + n, 0]), T.address_of(smem.norms[1, 0]),
                T.address_of(smem.XY[(h + n) * parts, 0, 0]),
                T.address_of(smem.diagonal[h + n, 0]), parts,
            )  # fmt: skip
            T.sync_threads()  # warps that have parted would serialise the next products
        T.wgmma_gemm(
            smem.S[h, :, :], smem.do_R[0, :, :], product, transpose_A=True, transpose_B=True,
            clear_accum=True,
        )  # fmt: skip
        T.wait_wgmma(0)
        add_dO_S(product, smem, regs, T.address_of(smem.row_factors[0, 0]))
        T.wgmma_gemm(
            smem.S[h, :, :], smem.do_R[1, :, :], product, transpose_A=True, transpose_B=True,
            clear_accum=True,
        )  # fmt: skip
        T.wait_wgmma(0)
        add_R_S(product, smem, regs, T.address_of(smem.row_factors[1, 0]))
        T.wgmma_gemm(smem.dS[h, :, :], smem.U, product, transpose_A=True, clear_accum=True)
        T.wait_wgmma(0)
        add_U_dS(product, smem, regs, T.address_of(smem.norms[1, 0]), chunk.live)

    @T.macro
    def store_dq_dk(dq, dk, smem, regs, chunk, h, x):
        thread = h * 128 + x
        warp = h * 4 + x // 32
        if l2:
            dot_rows(smem.q, regs.dq, T.address_of(smem.dots[1, warp, 0]))
            dot_rows(smem.k, regs.dk, T.address_of(smem.dots[2, warp, 0]))
        T.sync_threads()
        if thread < C:
            for n in T.unroll(2):
                smem.along[n, thread] = 0.0
                if l2:
                    for m in T.unroll(4 * blocks):
                        smem.along[n, thread] += smem.dots[1 + n, m, thread]
                    smem.along[n, thread] *= smem.norms[n, thread] * smem.norms[n, thread]
        T.sync_threads()
        put_gradient(regs.dq, T.address_of(smem.along[0, 0]), smem.q)
        put_gradient(regs.dk, T.address_of(smem.along[1, 0]), smem.k)
        T.fence_proxy_async()
        T.sync_threads()
        for tile, to in ((smem.q, dq), (smem.k, dk)):
            store_rows(
                tile, to, chunk.batch, chunk.token, chunk.live, chunk.key_head, thread, threads
            )
        if thread < 32:
            T.tma_store_wait(0)
        if chunk.live < C:  # all threads have read the tiles, which the next loads overwrite
            T.fence_proxy_async()
            T.sync_threads()

    @T.prim_func
    def channel_gradients_kernel(
        q: strided("q", (B, L, H, K), dtype), k: strided("k", (B, L, H, K), dtype),
        g: T.Tensor((B, L, HV, K), gates), A_log: T.Tensor((HV,), "float32"),
        dt_bias: T.Tensor((HV, K), "float32"), do: T.Tensor((B, L, HV, V), dtype),
        factors: T.Tensor((slots, HV, rows_of_factors(K, True), C), "float32"),
        rowsum_RV: T.Tensor((slots, HV, V // ROWS, C), "float32"),
        U: T.Tensor((slots, HV, V, C), dtype), S: T.Tensor((slots, HV, V, K), dtype),
        dS: T.Tensor((slots, HV, V, K), dtype),
        row_scales: T.Tensor((slots, HV, V // ROWS, ROWS), "float32"),
        chunk_spans: T.Tensor((spans, 2), "int32"), dq: T.Tensor((B, L, H, K), dtype),
        dk: T.Tensor((B, L, H, K), dtype), dv: T.Tensor((B, L, HV, V), dtype),
        dg: T.Tensor((B, L, HV, K), gates), dbeta: T.Tensor((B, L, HV), strengths),
        dA_log: T.Tensor((partial, HV), "float32"),
        ddt_bias: T.Tensor((partial, HV, K), "float32"), scale: T.float32, thread_blocks: T.int32,
    ):  # fmt: skip
        """dv: holds the stored R when the kernel starts."""
        with T.Kernel(thread_blocks, threads=(128, blocks), prelude=prelude) as cta:
            smem = ChannelGradientsSmem(K, V, dtype, parts)
            regs, product = Registers(), T.alloc_fragment((COLUMNS, C), "float32")
            chunk, later = Fields(*CHUNK_FIELDS), Fields(*CHUNK_FIELDS)
            head_ready, chunk_ready = T.alloc_barrier(32), T.alloc_barrier(32)
            x, h = T.get_thread_binding(0), T.get_thread_binding(1)
            thread = h * 128 + x
            of_head = (do, dv, factors, rowsum_RV, U, S, dS, row_scales)
            steps = T.ceildiv(slots * H - cta, thread_blocks) * group
            chunks = T.alloc_var("int32")  # loaded so far
            chunks = 0
            find_head(chunk_spans, later, cta, thread_blocks, 0)
            if thread < 32:
                load_chunk(q, k, smem, chunk_ready, later)
                load_head(*of_head, smem, head_ready, *place(later), K)
            # Unused slots are computed too, and nothing of them is stored: a branch around the
            # products would serialise them.
            for step in T.serial(steps):
                for n in T.unroll(len(CHUNK_FIELDS)):
                    chunk.array[n] = later.array[n]
                more = step + 1 < steps
                if more:
                    find_head(chunk_spans, later, cta, thread_blocks, step + 1)
                load_decays(
                    g, A_log, dt_bias, smem, chunk.batch, chunk.token, chunk.live, chunk.head, h, x,
                    gate, bias, has_A_log, lower_bound,
                )  # fmt: skip
                take_decays(smem, regs, thread)
                join_all(regs)
                T.clear(regs.from_start)
                T.barrier_wait(head_ready, step % 2)
                if chunk.first == 1:
                    T.barrier_wait(chunk_ready, chunks % 2)
                    chunks += 1
                    T.clear(regs.dq)
                    T.clear(regs.dk)
                prepare_rows(dv, smem, chunk, scale, h, x)
                multiply_states(smem, regs, product, chunk, h, x)
                T.fence_proxy_async()
                T.sync_threads()
                if T.And(thread < 32, more):
                    load_head(*of_head, smem, head_ready, *place(later), K)
                add_e_gamma(smem, regs)
                take_decays(smem, regs, thread)
                put_terms(smem, regs, thread)
                if chunk.live > 0:
                    add_pairs(smem, regs, parts, thread, lower_bound)
                take_terms(smem, regs, thread)
                add_diagonal(smem, regs, T.address_of(smem.diagonal[0, 0]))
                sum_channels(regs.rights, T.address_of(smem.dots[0, thread // 32, 0]))
                sum_from_tokens(regs)
                store_gate_gradients(
                    g, A_log, dt_bias, dg, ddt_bias, smem, regs, chunk.batch, chunk.token,
                    chunk.live, chunk.slot, chunk.head, h, x, gate, bias, has_A_log, lower_bound,
                )  # fmt: skip
                T.sync_threads()
                if thread < C:
                    store_beta_gradient(
                        dbeta, dA_log, smem, chunk.batch, chunk.token, chunk.live, chunk.slot,
                        chunk.head, thread, has_A_log, gate, sigmoid, double,
                    )  # fmt: skip
                if chunk.last == 1:
                    store_dq_dk(dq, dk, smem, regs, chunk, h, x)
                    if T.And(thread < 32, more):
                        load_chunk(q, k, smem, chunk_ready, later)

    return channel_gradients_kernel
