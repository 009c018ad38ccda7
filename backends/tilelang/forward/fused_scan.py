"""The scan in `fused.py`, by one consumer warpgroup; `scan_step.py` has the equations.

A consumer warpgroup computes half of P too. K S and Q S are computed together, before U: then S in
half precision, an operand of both, is not needed any more, and a thread needs 192 registers instead
of 208.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragments import PAIRS
from ..tile.indexing import SEQUENCE, START, STOP
from ..tile.layout import KS_FACTOR, QS_FACTOR, ROWS, S_FACTOR, U_FACTOR
from ..tile.pool import READS, WRITES
from ..tile.pool_kind import PoolKind
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end
from ..tile.row_scales import rescale
from .checkpoints import scan_to_checkpoints
from .fused_intra_chunk import store_P
from .fused_memory import (
    CHUNKS,
    FORGETS,
    HEAD,
    LAST,
    LAST_NUMBER,
    NUMBER,
    PIECE,
    POOL_SLOT,
    FusedSmem,
    parity_of,
    stage_of,
)
from .scan_step import (
    ScanFragments,
    begin_scan,
    keep_rounding_here,
    load_state,
    set_unit_state,
    stage_output,
    store_state,
)

TURNS = 5, 7
"""Named barriers, two each. With output, the consumer warpgroups start K S and Q S, and then the
products for S and O, in turn. Started together, the products of both would end together, when all
had been computed. In turn, those of one are computed while the other is busy with registers."""
PRELUDE = """
// Of the 16 columns number `pair` of a fragment: the transpose of 16 rows of shared memory, plus x
// times a factor for each column. The rows are never in registers as a whole. `scales`,
// if given, multiply the transpose: one for each of a lane's two rows.
template <class Pair>
__device__ __forceinline__ void gdn_add_scaled(
    const void *rows, const float *x, const void *factors, void *to, int pair,
    const float *scales = nullptr) {
  unsigned v[4], *words = static_cast<unsigned *>(to) + 4 * pair;
  tl::ptx_ldmatrix_x4_trans(rows, v);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float2 f = static_cast<const float2 *>(factors)[8 * pair + 4 * n + threadIdx.x % 4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float *from = x + 8 * pair + 4 * n + 2 * m;
      float2 y = gdn_widen(*reinterpret_cast<Pair *>(v + 2 * n + m));
      if (scales) y.x *= scales[m], y.y *= scales[m];
      Pair sum = gdn_narrow<Pair>(make_float2(y.x + f.x * from[0], y.y + f.y * from[1]));
      words[2 * n + m] = *reinterpret_cast<unsigned *>(&sum);
    }
  }
}
"""


@T.macro
def add_scaled(
    rows: Any, tile: Any, x: Any, factors: Any, to: Any, thread: Any, *scales: Any
) -> None:
    """to = rows[tile]^T + x * factors, a fragment [64, C] in half precision; x is one in float32.
    factors: address of C numbers; scales: what the rows of rows[tile]^T are multiplied by."""
    warp, lane = thread // 32, thread % 32
    for pair in T.unroll(C // 16):
        T.call_extern(
            "handle",
            f"gdn_add_scaled<{PAIRS[rows.dtype]}>",
            T.address_of(
                rows[tile, pair * 16 + lane // 16 * 8 + lane % 8, warp * 16 + lane // 8 % 2 * 8]
            ),
            x.data,
            factors,
            to.data,
            pair,
            *scales,
        )


@T.macro
def take_turn(first: int, wg: Any) -> None:
    """Wait until the other consumer warpgroup has passed the turn."""
    T.sync_threads(first + wg, 256)


@T.macro
def pass_turn(first: int, wg: Any) -> None:
    """Let the other consumer warpgroup go on."""
    T.named_barrier_arrive(first + 1 - wg, 256)


@T.macro
def begin_turns(wg: Any) -> None:
    """The first turn of each kind is the first consumer warpgroup's."""
    if wg == 1:
        pass_turn(TURNS[0], wg)
        pass_turn(TURNS[1], wg)


@T.macro
def compute_P(kqT: Any, smem: Any, s: Any, wg: Any, thread: Any) -> None:
    """Half of the rows of P, for both consumer warpgroups."""
    T.wgmma_gemm(
        smem.k[s, :, :], smem.q[s, wg * (C // 2) : (wg + 1) * (C // 2), :], kqT,
        transpose_B=True, clear_accum=True,
    )  # fmt: skip
    T.wait_wgmma(0)
    store_P(kqT, smem.P, smem.tokens, s, wg, thread // 32, thread % 32)
    fence()


@T.macro
def start_chunk(frag: ScanFragments, smem: Any, s: Any, wg: Any, output: bool) -> None:
    """Start K S and Q S of the chunk in stage s; meanwhile compute e^gamma S."""
    if output:
        take_turn(TURNS[0], wg)
    T.wgmma_gemm(frag.S_half, smem.k[s, :, :], frag.KS, transpose_B=True, clear_accum=True)
    if output:
        T.wgmma_gemm(frag.S_half, smem.q[s, :, :], frag.O, transpose_B=True, clear_accum=True)
        pass_turn(TURNS[0], wg)
    for i, j in T.Parallel(*frag.S.shape):
        frag.S[i, j] *= smem.scan_factors[s, S_FACTOR, 0]


@T.macro
def finish_chunk(
    frag: ScanFragments, smem: Any, s: Any, v_tile: Any, wg: Any, thread: Any, output: bool
) -> None:
    """O (output), and S after the chunk. U is computed in K S's place."""
    T.wait_wgmma(0)
    scales = [] if frag.rows is None else [frag.rows.reciprocals.data]
    add_scaled(
        smem.v, v_tile, frag.KS, T.address_of(smem.scan_factors[s, KS_FACTOR, 0]), frag.half,
        thread, *scales,
    )  # fmt: skip
    T.wgmma_gemm(frag.half, smem.A_v[s, :, :], frag.KS, transpose_B=True, clear_accum=True)
    if output:
        for i, j in T.Parallel(ROWS, C):
            frag.O[i, j] *= smem.scan_factors[s, QS_FACTOR, j]
    T.wait_wgmma(0)
    for i, j in T.Parallel(ROWS, C):
        frag.scaled_U[i, j] = frag.KS[i, j] * smem.scan_factors[s, U_FACTOR, j]
    if output:
        T.copy(frag.KS, frag.half)
        take_turn(TURNS[1], wg)
    T.wgmma_gemm(frag.scaled_U, smem.k[s, :, :], frag.S)
    if output:
        T.wgmma_gemm(frag.half, smem.P[s, :, :], frag.O, transpose_B=True)
        pass_turn(TURNS[1], wg)
    T.wait_wgmma(1 if output else 0)
    if frag.rows is not None:
        rescale(frag.rows, frag.S)
    T.copy(frag.S, frag.S_half)
    if output:
        T.wait_wgmma(0)


class ScanEnds(NamedTuple):
    """The states before and after a scan: whether S_in is read and S_out written, whether they are
    [V, K], whether sequences are cut, whether it is the transfer scan, and the pools that S_in and
    S_out are."""

    initial: bool
    final: bool
    v_first_in: bool
    v_first_out: bool
    cut: bool
    transfer: bool
    pool_in: PoolKind | None
    pool_out: PoolKind | None

    @property
    def has_checkpoints(self) -> bool:
        """Whether the scan stores states on its way."""
        return self.pool_out is not None and bool(self.pool_out.offsets)


@T.macro
def consume_chunk(
    chunk: Any, frag: Any, kqT: Any, smem: Any, ready: Any, keys_ready: Any, intra_chunk_ready: Any,
    v_ready: Any, o_ready: Any, task: Any, first: Any, chunks: Any, wg: Any, thread: Any,
    output: bool,
) -> None:  # fmt: skip
    """One chunk: O, in v's place, and S."""
    stages = smem.stages
    s, parity = stage_of(first, chunk, stages), parity_of(first, chunk, stages)
    v_tile = s * 2 + wg
    if output:
        T.barrier_wait(keys_ready[s], parity)  # so q and k are there, too
        compute_P(kqT, smem, s, wg, thread)
        T.barrier_arrive(intra_chunk_ready[s])
    else:
        T.barrier_wait(ready[s], parity)
    T.barrier_wait(intra_chunk_ready[s], parity)
    start_chunk(frag, smem, s, wg, output)
    T.barrier_wait(v_ready[s], parity)
    if chunk == chunks - 1 and task[LAST] < C:  # the rows past the end may hold anything
        clear_rows_past_end((smem.v,), v_tile, task[LAST])
        T.sync_threads(1 + wg, 128)
    finish_chunk(frag, smem, s, v_tile, wg, thread, output)
    if output:
        stage_output(frag, smem.v, v_tile, thread)
        fence()
    T.barrier_arrive(o_ready[s])


@T.macro
def consume_chunks(
    task: Any, first: Any, S_in: Any, S_out: Any, smem: Any, ready: Any, keys_ready: Any,
    intra_chunk_ready: Any, v_ready: Any, o_ready: Any, block: Any, wg: Any, thread: Any, frag: Any,
    kqT: Any, V: int, ends: ScanEnds, checkpoints: tuple[Any, ...],
) -> None:  # fmt: skip
    """A consumer warpgroup: 64 rows of S^T; for `for_each_task`. checkpoints: as for
    `scan_to_checkpoints`."""
    # === the state to start from ===
    row, stages, output = wg * ROWS, FusedSmem.STAGES[not ends.transfer], not ends.transfer
    rows, v_first_in, v_first_out = V + frag.S.shape[1], ends.v_first_in, ends.v_first_out
    from_pool, to_pool = ends.pool_in is not None, ends.pool_out is not None
    if ends.transfer:
        set_unit_state(frag, row if block > 0 else -V)
        if block > 0:
            for s, i, j in T.Parallel(stages, C, ROWS):
                smem.v[s * 2 + wg, i, j] = 0
            T.sync_threads(1 + wg, 128)
        elif from_pool:
            if T.And(T.And(task[NUMBER] == 0, task[FORGETS] == 0), task[POOL_SLOT + READS] != 0):
                load_state(frag, S_in, task[POOL_SLOT], task[HEAD], row, v_first_in, pooled=True)
        elif ends.initial:  # noqa: SIM102, known before the kernel is; the next is not
            if T.And(task[NUMBER] == 0, task[FORGETS] == 0):
                load_state(frag, S_in, task[SEQUENCE], task[HEAD], row, v_first_in)
    elif from_pool:
        T.clear(frag.S)
        if task[POOL_SLOT + READS] != 0:
            load_state(frag, S_in, task[POOL_SLOT], task[HEAD], row, v_first_in, pooled=True)
        keep_rounding_here(frag)
    elif ends.initial:
        load_state(frag, S_in, task[PIECE], task[HEAD], row, v_first_in)
    else:
        T.clear(frag.S)
    begin_scan(frag)

    # === chunk by chunk ===
    chunks = T.alloc_var("int32")
    chunks = task[CHUNKS]
    scanned = (
        frag, kqT, smem, ready, keys_ready, intra_chunk_ready, v_ready, o_ready, task, first,
        chunks, wg, thread, output,
    )  # fmt: skip
    if ends.has_checkpoints:
        scan_to_checkpoints(
            checkpoints, ends.pool_out, task[SEQUENCE],
            T.if_then_else(chunks > 0, task[STOP] - task[START], 0), frag, task[HEAD], row,
            v_first_out, consume_chunk, *scanned,
        )  # fmt: skip
    else:
        for chunk in T.serial(chunks):
            consume_chunk(chunk, *scanned)

    # === the final state ===
    if ends.transfer:
        if T.And(chunks > 0, block * V + row < rows):
            store_state(frag, S_out, task[PIECE], task[HEAD], block * V + row, v_first_out)
    elif to_pool:
        keep_rounding_here(frag)
        last = T.Or(not ends.cut, task[NUMBER] == task[LAST_NUMBER])
        if T.And(last, task[POOL_SLOT + WRITES] != 0):
            store_state(frag, S_out, task[POOL_SLOT], task[HEAD], row, v_first_out, pooled=True)
    elif ends.final:  # noqa: SIM102
        if T.Or(not ends.cut, task[NUMBER] == task[LAST_NUMBER]):
            store_state(frag, S_out, task[SEQUENCE], task[HEAD], row, v_first_out)
