"""Backward, stage 4: all gradients but those of the states, chunk by chunk.

The equations and shapes are in `gradients_inter.py` (dq and dk through the states),
`gradients_intra.py` (dq and dk between the tokens of a chunk) and `gradients_gates.py` (beta, g,
and dv where beta is small).

Reads q, k, g, dO, `G_beta`, `norms`, rowsum(R * V), U^T, S^T, dS^T and, in the memory of dv, the
stored R. Writes dq, dk, dg, dbeta, dv where beta is small, and partial sums for A_log and dt_bias.
In float16 U^T and S^T are over the scales of their rows (`tile/row_scales.py`), by which it
multiplies dO, R and dS where any scale exceeds 1.

Thread block: one on an SM; it takes every `thread_blocks`-th pair of chunk and q/k head, and loads
the next one while it finishes one. It sums dq and dk over the value heads of the q/k head in
registers, in a fixed order, so that runs are bit-equal. Its threads are (128, K / 64 + 2), and
threadIdx.y is the role: warpgroups of one kind then share one copy of their code.

    y < K / 64        inter-chunk warpgroups: 64 columns each of dq and dk
    y = K / 64        intra-chunk warpgroup: the [C, C] tiles F and D
    y = K / 64 + 1    x < 32: producer warp, loads by TMA
                      x < 64: storing warp, gradients of gates and beta; dq and dk by TMA
                      else: dv warps, dv of tokens with small beta

The inter-chunk warpgroups are the critical path. Other warps therefore do the work and the waits
that they can do for them.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragment_sums import PRELUDE
from ..tile.indexing import Fields, rolled_loop, strided
from ..tile.largest import PRELUDE as LARGEST
from ..tile.layout import ROWS
from ..tile.ragged_rows import clear_past_end, clear_rows_past_end
from .gradients_gates import store_gate_gradients, store_weak_dv
from .gradients_inter import (
    InterFragments,
    accumulate_inter_chunk,
    add_intra_chunk,
    apply_norms,
    stage_dq_dk,
    store_dq_dk,
)
from .gradients_intra import (
    IntraFragments,
    accumulate_D,
    accumulate_F,
    compute_kk_qk,
    keep_norms,
    multiply_by_scales,
    stage_tiles,
)
from .gradients_memory import (
    CHUNK_FIELDS,
    COLUMNS,
    Barriers,
    GradientsSmem,
    find_largest_scales,
    largest_scale,
    load_rows,
    load_state,
    load_tokens,
    locate_chunk,
)

ROWS_READY, TILES_READY, INTER, INTRA, R_READ = range(1, 6)
"""Named barriers: the first two of inter- and intra-chunk warpgroups, the next two of one kind, the
last one of the intra-chunk warpgroup and the dv warps."""
REGISTERS = {1: (224, 224, 56), 2: (160, 136, 56)}
"""By K / 64: registers a thread of the inter-chunk warpgroups, the intra-chunk one, the others."""


@kernel(own_barriers=True)
def gradients(
    *, dtype: str, gates: str, strengths: str, K: int, V: int, group: int,
    varlen: bool, l2: bool, gate: bool, bias: bool, sigmoid: bool, double: bool,
) -> Any:  # fmt: skip
    """Build the kernel. gates, strengths: dtypes of g and beta; group: HV / H; l2, gate, bias,
    sigmoid, double: fused options of the call."""
    B, L, H, HV = (T.dynamic(name) for name in ("B", "L", "H", "HV"))
    slots, rows, partial = (T.dynamic(name) for name in ("slots", "rows", "partial"))
    blocks = K // COLUMNS
    inter_threads = 128 * blocks
    consumers = inter_threads + 128
    registers = REGISTERS[blocks]

    # In these macros n is the number of a value head since the kernel began. n % 2 is its buffer,
    # n // 2 % 2 the parity of that buffer's barriers. `parity` is that of barriers of a chunk.

    @T.macro
    def for_each_chunk(chunk_spans, chunk, first, thread_blocks, role, *args):
        """Run role(*args) for every chunk of the thread block."""
        for step in T.serial(T.ceildiv(slots * H - first, thread_blocks)):
            locate_chunk(first + step * thread_blocks, chunk_spans, L, H, chunk, varlen)
            if chunk.live > 0:
                role(*args)
                chunk["chunks_done"] += 1
                chunk["heads_done"] += group

    @T.macro
    def compute_inter_chunk(frag, smem, bars, h, chunk, scale, thread):
        """An inter-chunk warpgroup: block h of dq and dk."""
        T.clear(frag.dq)
        T.clear(frag.dk)
        frag.largest_scales[1] = 1.0
        for g in rolled_loop(group):
            n = chunk.heads_done + g
            T.barrier_wait(bars.tokens_ready[n % 2], n // 2 % 2)
            if chunk.live < C:
                T.sync_threads(ROWS_READY, consumers)
            if smem.has_scales:
                find_largest_scales(smem, frag, n % 2)
                if frag.largest_scales[0] > 1:
                    T.sync_threads(ROWS_READY, consumers)
            accumulate_inter_chunk(
                smem, frag, bars, h, n, g, group, chunk.chunks_done % 2, scale, INTER, thread
            )
            T.barrier_arrive(bars.sums_ready[n % 2])
            T.barrier_arrive(bars.tokens_free[n % 2])
        T.sync_threads(TILES_READY, consumers)
        last = (chunk.heads_done + group - 1) % 2
        add_intra_chunk(smem, frag, last, h)
        if l2:
            apply_norms(smem, frag, chunk.chunks_done % 2, h, bars.qk_free, INTER, thread)
        else:
            T.barrier_arrive(bars.qk_free)
            T.sync_threads(INTER, inter_threads)  # dq takes the place of the tiles of F
        stage_dq_dk(smem, frag, last, h)
        T.barrier_arrive(bars.dq_dk_ready)

    @T.macro
    def compute_intra_chunk(frag, smem, bars, chunk, scale, thread):
        """The intra-chunk warpgroup: F, D and their sums. It also clears rows past the end."""
        live, parity, before = chunk.live, chunk.chunks_done % 2, chunk.heads_done
        T.barrier_wait(bars.qk_ready, parity)
        T.barrier_wait(bars.tokens_ready[before % 2], before // 2 % 2)  # for the norms
        if live < C:
            clear_past_end(smem.q, live)
            clear_past_end(smem.k, live)
            T.fence_proxy_async()
        keep_norms(smem, before % 2, parity, thread)
        T.sync_threads(INTRA, 128)
        compute_kk_qk(smem, frag, parity, scale)
        T.clear(frag.F)
        T.clear(frag.D)
        frag.largest_scales[1] = 1.0
        for g in rolled_loop(group):
            n = before + g
            b = n % 2
            T.barrier_wait(bars.tokens_ready[b], n // 2 % 2)
            if live < C:
                clear_rows_past_end((smem.do, smem.R), b, live)
                T.fence_proxy_async()
                T.sync_threads(ROWS_READY, consumers)
            if smem.has_scales:
                find_largest_scales(smem, frag, b)
                if frag.largest_scales[0] > 1:
                    T.sync_threads(R_READ, 128 + 64)
                    multiply_by_scales(smem, b)
                    T.sync_threads(ROWS_READY, consumers)
            accumulate_D(smem, frag, b, thread)
            accumulate_F(smem, frag, b, thread)
            T.barrier_arrive(bars.sums_ready[b])
            T.barrier_arrive(bars.tokens_free[b])
        T.barrier_wait(bars.tiles_free, parity)
        T.barrier_wait(bars.dq_dk_free, parity ^ 1)
        T.sync_threads(INTRA, 128)  # all of it has read U, kk and qk, whose memory tiles take
        stage_tiles(smem, frag, (before + group - 1) % 2, parity, scale)
        T.sync_threads(TILES_READY, consumers)

    @T.macro
    def load_chunk(q, k, do, R, G_beta, norms, rowsum_RV, U, S, dS, row_scales, smem, bars, chunk):
        """The producer warp."""
        batch, token, slot, key_head = chunk.batch, chunk.token, chunk.slot, chunk.key_head
        for g in rolled_loop(group):
            head, n = key_head * group + g, chunk.heads_done + g
            b = n % 2
            T.barrier_wait(bars.tokens_free[b], n // 2 % 2 ^ 1)
            T.barrier_wait(bars.sums_free[b], n // 2 % 2 ^ 1)
            load_tokens(
                do, R, G_beta, norms, rowsum_RV, U, row_scales, smem, bars, b, batch, token, slot,
                head, key_head,
            )  # fmt: skip
            T.barrier_wait(bars.dS_free, n % 2 ^ 1)
            load_state(dS, smem.dS, bars.dS_ready, slot, head)
            T.barrier_wait(bars.S_free, n % 2 ^ 1)
            load_state(S, smem.S, bars.S_ready, slot, head)
            if g == 0:  # last, since the chunk before keeps q and k to its end
                T.barrier_wait(bars.qk_free, chunk.chunks_done % 2 ^ 1)
                load_rows(q, smem.q, bars.qk_ready, batch, token, key_head)
                load_rows(k, smem.k, bars.qk_ready, batch, token, key_head)
                T.barrier_arrive(bars.qk_ready)

    @T.macro
    def store_chunk(
        dq, dk, g, A_log, dt_bias, dg, dbeta, dA_log, ddt_bias, smem, bars, chunk, scale, lane
    ):
        """The storing warp."""
        for number in rolled_loop(group):
            n = chunk.heads_done + number
            T.barrier_wait(bars.sums_ready[n % 2], n // 2 % 2)
            store_gate_gradients(
                smem, g, A_log, dt_bias, dg, dbeta, dA_log, ddt_bias, n % 2, chunk.batch,
                chunk.token, chunk.live, chunk.slot, chunk.key_head * group + number, scale, lane,
                gate, bias, sigmoid, double,
            )  # fmt: skip
            if number < group - 1:
                T.barrier_arrive(bars.sums_free[n % 2])
        last = (chunk.heads_done + group - 1) % 2
        T.barrier_wait(bars.dq_dk_ready, chunk.chunks_done % 2)
        store_dq_dk(smem, dq, dk, last, chunk.batch, chunk.token, chunk.live, chunk.key_head, lane)
        T.barrier_arrive(bars.dq_dk_free)
        T.barrier_arrive(bars.sums_free[last])  # not before: U and dO may hold dq and dk

    @T.macro
    def store_dv(dv, smem, bars, chunk, thread):
        """The dv warps."""
        for g in rolled_loop(group):
            n = chunk.heads_done + g
            T.barrier_wait(bars.tokens_ready[n % 2], n // 2 % 2)
            store_weak_dv(
                smem, dv, n % 2, chunk.batch, chunk.token, chunk.live, chunk.key_head * group + g,
                thread,
            )  # fmt: skip
            if smem.has_scales:  # noqa: SIM102, known before the kernel is; the next is not
                if largest_scale(smem, n % 2) > 1:
                    T.sync_threads(R_READ, 128 + 64)
            T.barrier_arrive(bars.sums_ready[n % 2])
            T.barrier_arrive(bars.tokens_free[n % 2])

    @T.prim_func
    def gradients_kernel(
        q: strided("q", (B, L, H, K), dtype), k: strided("k", (B, L, H, K), dtype),
        g: strided("g", (B, L, HV), gates),
        A_log: T.Tensor((HV,), "float32"), dt_bias: T.Tensor((HV,), "float32"),
        do: T.Tensor((B, L, HV, V), dtype), G_beta: T.Tensor((slots, HV, 2, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"),
        rowsum_RV: T.Tensor((slots, HV, V // ROWS, C), "float32"),
        U: T.Tensor((slots, HV, V, C), dtype), S: T.Tensor((slots, HV, V, K), dtype),
        dS: T.Tensor((slots, HV, V, K), dtype),
        row_scales: T.Tensor((slots, HV, V // ROWS, ROWS), "float32"),
        chunk_spans: T.Tensor((rows, 2), "int32"),
        dq: T.Tensor((B, L, H, K), dtype), dk: T.Tensor((B, L, H, K), dtype),
        dv: T.Tensor((B, L, HV, V), dtype), dg: T.Tensor((B, L, HV), gates),
        dbeta: T.Tensor((B, L, HV), strengths), dA_log: T.Tensor((partial, HV), "float32"),
        ddt_bias: T.Tensor((partial, HV), "float32"), scale: T.float32, thread_blocks: T.int32,
    ):  # fmt: skip
        """dv: holds the stored R when the kernel starts."""
        with T.Kernel(thread_blocks, threads=(128, blocks + 2), prelude=PRELUDE + LARGEST) as first:
            chunk = Fields(*CHUNK_FIELDS)
            chunk["chunks_done"] = 0
            chunk["heads_done"] = 0
            smem = GradientsSmem(K, V, dtype, l2)
            bars = Barriers(inter_threads)
            tx, role = T.get_thread_binding(0), T.get_thread_binding(1)
            mine = (chunk_spans, chunk, first, thread_blocks)
            if role < blocks:
                # === inter-chunk warpgroups ===
                T.set_max_nreg(registers[0], 1)
                inter_frag = InterFragments(dtype)
                for_each_chunk(
                    *mine, compute_inter_chunk, inter_frag, smem, bars, role, chunk, scale, tx
                )
            elif role == blocks:
                # === intra-chunk warpgroup ===
                T.set_max_nreg(registers[1], 1)
                intra_frag = IntraFragments(dtype)
                for_each_chunk(*mine, compute_intra_chunk, intra_frag, smem, bars, chunk, scale, tx)
            else:
                T.set_max_nreg(registers[2], 0)
                if tx < 32:
                    # === producer warp ===
                    inputs = (q, k, do, dv, G_beta, norms, rowsum_RV, U, S, dS, row_scales)
                    for_each_chunk(*mine, load_chunk, *inputs, smem, bars, chunk)
                elif tx < 64:
                    # === storing warp ===
                    outputs = (dq, dk, g, A_log, dt_bias, dg, dbeta, dA_log, ddt_bias)
                    for_each_chunk(*mine, store_chunk, *outputs, smem, bars, chunk, scale, tx - 32)
                else:
                    # === dv warps ===
                    for_each_chunk(*mine, store_dv, dv, smem, bars, chunk, tx - 64)

    return gradients_kernel
