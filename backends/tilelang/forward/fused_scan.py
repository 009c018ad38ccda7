"""One chunk of the scan in `fused.py`, by one consumer warpgroup; `scan_step.py` has the equations.

K S and Q S are computed together, before U: then S in half precision, an operand of both, is not
needed any more, and a thread needs 192 registers instead of 208.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..tile.fragments import PAIRS
from ..tile.layout import KS_FACTOR, QS_FACTOR, ROWS, S_FACTOR, U_FACTOR
from ..tile.row_scales import rescale
from .scan_step import ScanFragments

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
def start_chunk(frag: ScanFragments, smem: Any, s: Any, output: bool) -> None:
    """Start K S and Q S of the chunk in stage s; meanwhile compute e^gamma S."""
    T.wgmma_gemm(frag.S_half, smem.k[s, :, :], frag.KS, transpose_B=True, clear_accum=True)
    if output:
        T.wgmma_gemm(frag.S_half, smem.q[s, :, :], frag.O, transpose_B=True, clear_accum=True)
    for i, j in T.Parallel(*frag.S.shape):
        frag.S[i, j] *= smem.scan_factors[s, S_FACTOR, 0]


@T.macro
def finish_chunk(
    frag: ScanFragments, smem: Any, s: Any, v_tile: Any, thread: Any, output: bool
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
    T.wgmma_gemm(frag.scaled_U, smem.k[s, :, :], frag.S)
    if output:
        T.copy(frag.KS, frag.half)
        T.wgmma_gemm(frag.half, smem.P[s, :, :], frag.O, transpose_B=True)
    T.wait_wgmma(1 if output else 0)
    if frag.rows is not None:
        rescale(frag.rows, frag.S)
    T.copy(frag.S, frag.S_half)
    if output:
        T.wait_wgmma(0)
