"""The third stage of backward, a program a sequence, value head and 64 columns of V: the gradient
of the state, chunk by chunk from the last to the first. Where forward walked pieces at the same
time, so does this, twice: for what each piece hands back of its own, and then, after `carry.py`,
from the gradients that they really end with.

    P_ij = scale e^{G_i - G_j} rq_i rk_j q_i.k_j  for i >= j
    dU = P^T dO + e^{gamma - G} rk * (K dS),  R = A^T dU
    dS <- e^gamma dS + Q^T (scale e^G rq * dO) - K^T (beta e^G rk * R)

One warpgroup holds dS^T [64, K] in registers, as in `states.py`; another finds P and the tokens'
factors a chunk ahead of it; one warp loads and one stores. Reads q, k, v, dO, `factors`, `norms`
and `inverse`; writes the gradient of the state after every chunk, in the call's dtype, R, `kept`,
in dv's place, rowsum(R * V), a block of V apart from the other, and the gradient of the initial
state.
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragment_sums import PRELUDE as SUMS
from ..tile.fragment_sums import put_row
from ..tile.fragments import PRELUDE, load_transposed, store, store_transposed
from ..tile.gate_math import stored_R_scale
from ..tile.indexing import piece_bounds
from ..tile.layout import LOG2_E, ROWS
from ..tile.pacing import ClusterPace, wait_for_cluster
from ..tile.proxy_fence import PRELUDE as FENCES
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end
from .reverse_scan_memory import STAGES, Barriers, Memory, load, store_chunk

CUDA = FENCES + PRELUDE + SUMS
COUPLE = 1
"""Named barrier of the warpgroup that couples."""
REGISTERS = (248, 208, 48)
"""Registers a thread of those who carry, who couple, and who load and store."""


class Tile:
    """Registers of the warpgroup that holds the gradient of the state."""

    def __init__(self, K: int, dtype: str) -> None:
        self.dS = T.alloc_fragment((ROWS, K), "float32")
        self.after = T.alloc_fragment((ROWS, K), dtype)
        self.grad_o, self.read, self.dU_half, self.R_half, self.values = (
            T.alloc_fragment((ROWS, C), dtype) for _ in range(5)
        )
        self.dU, self.taken, self.R = (T.alloc_fragment((ROWS, C), "float32") for _ in range(3))
        self.decay = T.alloc_local((1,), "float32")


@T.macro
def find_factors(m: Any, s: Any, token: Any, scale: Any) -> None:
    """The factors of one token."""
    m.G2[s, token] = m.factors[s, 0, token] * LOG2_E
    grown = T.exp2(m.G2[s, token])
    rk = m.factors[s, 3, token]
    m.rows[s, token] = scale * m.factors[s, 2, token]
    m.onto[s, token] = rk * T.exp2(m.factors[s, 0, C - 1] * LOG2_E - m.G2[s, token])
    m.read[s, token] = m.rows[s, token] * grown
    m.through[s, token] = -m.factors[s, 1, token] * rk * grown
    m.kept[s, token] = stored_R_scale(m.factors[s, 1, token])


@T.macro
def couple(
    m: Any, P: Any, half: Any, bars: Any, s: Any, live: Any, scale: Any, parity: Any, thread: Any
) -> None:
    """P and the factors of the chunk in stage s, by the warpgroup that works ahead."""
    if live < C:
        clear_rows_past_end((m.q, m.k), s, live)
        clear_rows_past_end((m.do,), s, live)
        fence()
    if thread < C:
        find_factors(m, s, thread, scale)
    T.sync_threads(COUPLE, 128)
    T.wgmma_gemm(m.q[s, :, :], m.k[s, :, :], P, transpose_B=True, clear_accum=True)
    T.wait_wgmma(0)
    for i, j in T.Parallel(C, C):
        P[i, j] *= m.factors[s, 3, j] * T.exp2(
            T.if_then_else(i >= j, m.G2[s, i] - m.G2[s, j], -T.infinity("float32"))
        )
    for i, j in T.Parallel(C, C):
        half[i, j] = m.rows[s, i] * P[i, j]
    T.barrier_wait(bars.free, parity)
    T.copy(half, m.P)
    fence()


@T.macro
def go_back(m: Any, t: Any, bars: Any, s: Any, parity: Any, thread: Any, keep: bool) -> None:
    """The gradient of the state before the chunk in stage s; and, staged to be stored, dS and R
    once those of the chunk after have left, and R * V once that one's is summed."""
    T.copy(t.dS, t.after)
    T.wgmma_gemm(t.after, m.k[s, :, :], t.taken, transpose_B=True, clear_accum=True)
    load_transposed(m.do, s, t.grad_o, thread)
    t.decay[0] = T.exp2(m.factors[s, 0, C - 1] * LOG2_E)
    for i, j in T.Parallel(*t.dS.shape):
        t.dS[i, j] *= t.decay[0]
    for i, j in T.Parallel(ROWS, C):
        t.read[i, j] = m.read[s, j] * t.grad_o[i, j]
    T.wgmma_gemm(t.grad_o, m.P, t.dU, clear_accum=True)
    T.wgmma_gemm(t.read, m.q[s, :, :], t.dS)
    if keep:
        T.barrier_wait(bars.left, parity)
        store(t.after, m.dS, 0, thread)
    T.wait_wgmma(1)
    T.barrier_arrive(bars.free)
    for i, j in T.Parallel(ROWS, C):
        t.dU_half[i, j] = t.dU[i, j] + m.onto[s, j] * t.taken[i, j]
    T.wgmma_gemm(t.dU_half, m.A[s, :, :], t.R, clear_accum=True)
    if keep:
        load_transposed(m.v, s, t.values, thread)
    T.wait_wgmma(0)
    for i, j in T.Parallel(ROWS, C):
        t.R_half[i, j] = m.through[s, j] * t.R[i, j]
    T.wgmma_gemm(t.R_half, m.k[s, :, :], t.dS)
    if keep:
        for i, j in T.Parallel(ROWS, C):
            t.dU_half[i, j] = m.kept[s, j] * t.R[i, j]
        store_transposed(t.dU_half, m.R, 0, thread, 0)
        for i, j in T.Parallel(ROWS, C):
            t.R[i, j] *= t.values[i, j]
        T.barrier_wait(bars.summed, parity)
        put_row(t.R, T.address_of(m.given[thread // 4, thread % 4 * 2]))
        fence()
        T.barrier_arrive(bars.staged)
    T.wait_wgmma(0)


@T.macro
def give_back(m: Any, t: Any, s: Any, thread: Any) -> None:
    """What rounding took of `read` in stage s, of the last step: where the first token decays
    strongly, the gradient of the first state is little else than this product. (dO and `read` are
    found again: kept beyond the products of the loop, they would take 32 registers there.)"""
    load_transposed(m.do, s, t.grad_o, thread)
    for i, j in T.Parallel(ROWS, C):
        t.taken[i, j] = m.read[s, j] * t.grad_o[i, j]
    T.copy(t.taken, t.read)
    for i, j in T.Parallel(ROWS, C):
        t.read[i, j] = t.taken[i, j] - t.read[i, j]
    T.wgmma_gemm(t.read, m.q[s, :, :], t.dS)
    T.wait_wgmma(0)


@kernel(own_barriers=True)
def reverse_scan(
    *, dtype: str, offsets: str, K: int, V: int, group: int,
    varlen: bool, final: bool, initial: bool, v_first: bool, cut: bool, keep: bool,
) -> Any:  # fmt: skip
    """See the module. group: HV / H; final: whether the final state has a gradient, `end`; initial:
    whether that of the initial state is wanted, `begin`. Neither is touched otherwise. cut: into
    pieces; keep: whether the gradients of all states, R and rowsum(R * V) are."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots, bounds, M = (T.dynamic(name) for name in ("slots", "bounds", "M"))
    state, blocks = (V, K) if v_first else (K, V), V // ROWS

    @T.prim_func
    def reverse_scan_kernel(
        q: T.Tensor((B, L, H, K), dtype), k: T.Tensor((B, L, H, K), dtype),
        v: T.Tensor((B, L, HV, V), dtype), do: T.Tensor((B, L, HV, V), dtype),
        factors: T.Tensor((slots, HV, 2, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"),
        inverse: T.Tensor((slots, HV, C, C), dtype), end: T.Tensor((N, HV, *state), "float32"),
        cu_seqlens: T.Tensor((bounds,), offsets), dS_out: T.Tensor((slots, HV, V, K), dtype),
        R_out: T.Tensor((B, L, HV, V), dtype),
        given: T.Tensor((slots, HV, blocks, C), "float32"),
        begin: T.Tensor((M, HV, *state), "float32"),
        scale: T.float32, sequences: T.int32, pieces: T.int32, length: T.int32,
    ):  # fmt: skip
        with T.Kernel(
            pieces, HV, blocks, threads=384, cluster_dims=(1, 1, blocks), prelude=CUDA
        ) as (n, head, block):
            first, kh = block * ROWS, head // group
            place = T.alloc_local((4,), "int32")
            piece_bounds(n, cu_seqlens, sequences, L, length, place, varlen, cut)
            batch = 0 if varlen else place[0]
            start, stop, slot = place[1], place[2], place[3]
            chunks = T.ceildiv(T.max(stop - start, 0), C)

            m = Memory(K, dtype)
            bars = Barriers()
            pace = ClusterPace(blocks)
            tx = T.get_thread_binding()

            if tx < 128:
                T.set_max_nreg(REGISTERS[0], 1)
                t = Tile(K, dtype)
                if final:
                    for i, j in T.Parallel(ROWS, K):
                        t.dS[i, j] = (
                            end[n, head, first + i, j] if v_first else end[n, head, j, first + i]
                        )
                else:
                    T.clear(t.dS)
                for step in T.serial(chunks):
                    s = step % STAGES
                    T.barrier_wait(bars.coupled, step % 2)  # and so loaded
                    go_back(m, t, bars, s, step % 2 ^ 1, tx, keep)
                    T.barrier_arrive(bars.used[s])
                if initial:
                    if chunks > 0:
                        give_back(m, t, (chunks - 1) % STAGES, tx)
                    for i, j in T.Parallel(ROWS, K):
                        if v_first:
                            begin[n, head, first + i, j] = t.dS[i, j]
                        else:
                            begin[n, head, j, first + i] = t.dS[i, j]
            elif tx < 256:
                T.set_max_nreg(REGISTERS[1], 1)
                P = T.alloc_fragment((C, C), "float32")
                half = T.alloc_fragment((C, C), dtype)
                for step in T.serial(chunks):
                    s = step % STAGES
                    T.barrier_wait(bars.used[s], step // STAGES % 2 ^ 1)
                    T.barrier_wait(bars.full[s], step // STAGES % 2)
                    couple(
                        m, P, half, bars, s, stop - (start + (chunks - 1 - step) * C), scale,
                        step % 2 ^ 1, tx - 128,
                    )  # fmt: skip
                    T.barrier_arrive(bars.coupled)
            else:
                T.set_max_nreg(REGISTERS[2], 0)
                if tx < 256 + 32:
                    for step in T.serial(chunks):
                        s = step % STAGES
                        T.barrier_wait(bars.used[s], step // STAGES % 2 ^ 1)
                        wait_for_cluster(pace, step, tx == 256)
                        load(
                            q, k, v, do, factors, norms, inverse, m, bars,
                            batch, start + (chunks - 1 - step) * C, slot + chunks - 1 - step,
                            head, kh, first, s, keep,
                        )  # fmt: skip
                elif keep and tx < 256 + 64:
                    for step in T.serial(chunks):
                        chunk = chunks - 1 - step
                        T.barrier_wait(bars.staged, step % 2)
                        store_chunk(
                            m, bars, dS_out, R_out, given, batch, start + chunk * C,
                            stop - start - chunk * C, slot + chunk, head, block, tx - 256 - 32,
                        )  # fmt: skip

    return reverse_scan_kernel
