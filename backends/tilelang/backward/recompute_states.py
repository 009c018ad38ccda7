"""The second stage of backward, a program a sequence (or piece, where forward walked pieces at the
same time), value head and 64 columns of V: forward's states again, chunk by chunk.

    U = A (beta * (V - e^G rk * (K S)))
    S <- e^gamma S + K^T (e^{gamma - G} rk * U)

One warpgroup holds S^T [64, K] in registers, where S^T and U^T are the left operands of their
products; of another, one warp loads, two find the tokens' factors, ahead of it, and one stores.
Reads k, v, `factors`, `norms` and `inverse`; writes U^T and, in the call's dtype, S^T before every
chunk.
"""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.fragments import PRELUDE, load_transposed, store
from ..tile.indexing import piece_bounds
from ..tile.layout import LOG2_E, ROWS
from ..tile.pacing import ClusterPace, wait_for_cluster
from ..tile.proxy_fence import PRELUDE as FENCES
from ..tile.proxy_fence import fence
from ..tile.ragged_rows import clear_rows_past_end

STAGES = 2
CARRY = 1
"""A named barrier."""
REGISTERS = (224, 32)
"""Registers a thread of those who carry and of the others; two programs share a multiprocessor."""


class Memory:
    """Shared memory: what is loaded, STAGES chunks of it; factors of columns; what is stored."""

    def __init__(self, K: int, dtype: str) -> None:
        self.k = T.alloc_shared((STAGES, C, K), dtype)
        self.v = T.alloc_shared((STAGES, C, ROWS), dtype)
        self.A = T.alloc_shared((STAGES, C, C), dtype)
        self.factors = T.alloc_shared((STAGES, 4, C), "float32")
        self.through = T.alloc_shared((STAGES, C), "float32")  # -e^G rk
        self.onto = T.alloc_shared((STAGES, C), "float32")  # e^{gamma - G} rk
        self.S = T.alloc_shared((2, ROWS, K), dtype)  # of even and odd chunks
        self.U = T.alloc_shared((1, ROWS, C), dtype)


@T.macro
def load(
    k: Any, v: Any, factors: Any, norms: Any, inverse: Any, m: Any, full: Any,
    batch: Any, at: Any, slot: Any, head: Any, kh: Any, first: Any, s: Any,
) -> None:  # fmt: skip
    """A chunk to stage s, by one warp."""
    for source, target in (
        (k[batch, at : at + C, kh, :], m.k[s, :, :]),
        (v[batch, at : at + C, head, first : first + ROWS], m.v[s, :, :]),
        (inverse[slot, head, :, :], m.A[s, :, :]),
        (factors[slot, head, :, :], m.factors[s, 0:2, :]),
        (norms[slot, kh, :, :], m.factors[s, 2:4, :]),
    ):
        T.tma_copy(source, target, barrier=full[s], leader_scope_threads=32)
    T.barrier_arrive(full[s])


@T.macro
def find_factors(m: Any, s: Any, token: Any) -> None:
    """The factors of one token of the chunk in stage s."""
    G = m.factors[s, 0, token] * LOG2_E
    m.through[s, token] = -m.factors[s, 3, token] * T.exp2(G)
    m.onto[s, token] = m.factors[s, 3, token] * T.exp2(m.factors[s, 0, C - 1] * LOG2_E - G)


@kernel(own_barriers=True)
def recompute_states(
    *, dtype: str, offsets: str, K: int, V: int, group: int,
    varlen: bool, initial: bool, v_first: bool, cut: bool,
) -> Any:  # fmt: skip
    """See the module. group: HV / H; initial: whether `begin` holds states, else it is not read;
    cut: into pieces."""
    B, L, H, HV, N = (T.dynamic(name) for name in ("B", "L", "H", "HV", "N"))
    slots, bounds = T.dynamic("slots"), T.dynamic("bounds")
    state, blocks = (N, HV, V, K) if v_first else (N, HV, K, V), V // ROWS

    @T.prim_func
    def states_kernel(
        k: T.Tensor((B, L, H, K), dtype), v: T.Tensor((B, L, HV, V), dtype),
        factors: T.Tensor((slots, HV, 2, C), "float32"),
        norms: T.Tensor((slots, H, 2, C), "float32"),
        inverse: T.Tensor((slots, HV, C, C), dtype),
        begin: T.Tensor(state, "float32"), cu_seqlens: T.Tensor((bounds,), offsets),
        S_out: T.Tensor((slots, HV, V, K), dtype), U_out: T.Tensor((slots, HV, V, C), dtype),
        sequences: T.int32, pieces: T.int32, length: T.int32,
    ):  # fmt: skip
        with T.Kernel(
            pieces, HV, blocks, threads=256, cluster_dims=(1, 1, blocks), prelude=FENCES + PRELUDE
        ) as (n, head, block):
            T.annotate_min_blocks_per_sm(2)
            first, kh = block * ROWS, head // group
            place = T.alloc_local((4,), "int32")
            piece_bounds(n, cu_seqlens, sequences, L, length, place, varlen, cut)
            batch = 0 if varlen else place[0]
            start, stop, slot = place[1], place[2], place[3]
            chunks = T.ceildiv(T.max(stop - start, 0), C)

            m = Memory(K, dtype)
            T.annotate_layout({m.v: make_full_bank_swizzled_layout(m.v)})
            full = T.alloc_barrier([32] * STAGES)
            used = T.alloc_barrier([128] * STAGES)
            factored = T.alloc_barrier([C] * STAGES)
            staged, left = T.alloc_barrier(128), T.alloc_barrier(32)
            pace = ClusterPace(blocks)
            tx = T.get_thread_binding()

            if tx < 128:
                T.set_max_nreg(REGISTERS[0], 1)
                S = T.alloc_fragment((ROWS, K), "float32")
                before = T.alloc_fragment((ROWS, K), dtype)
                values = T.alloc_fragment((ROWS, C), dtype)
                known = T.alloc_fragment((ROWS, C), "float32")
                error = T.alloc_fragment((ROWS, C), dtype)
                U = T.alloc_fragment((ROWS, C), "float32")
                U_half = T.alloc_fragment((ROWS, C), dtype)
                decay = T.alloc_local((1,), "float32")
                if initial:
                    for i, j in T.Parallel(ROWS, K):
                        S[i, j] = (
                            begin[n, head, first + i, j]
                            if v_first
                            else begin[n, head, j, first + i]
                        )
                else:
                    T.clear(S)
                for chunk in T.serial(chunks):
                    s = chunk % STAGES
                    at = start + chunk * C
                    T.barrier_wait(factored[s], chunk // STAGES % 2)  # and so loaded
                    if at + C > stop:
                        clear_rows_past_end((m.k,), s, stop - at)
                        clear_rows_past_end((m.v,), s, stop - at)
                        fence()
                        T.sync_threads(CARRY, 128)
                    decay[0] = T.exp2(m.factors[s, 0, C - 1] * LOG2_E)

                    T.copy(S, before)
                    for i, j in T.Parallel(ROWS, K):
                        S[i, j] *= decay[0]
                    T.wgmma_gemm(before, m.k[s, :, :], known, transpose_B=True, clear_accum=True)
                    load_transposed(m.v, s, values, tx)
                    store(before, m.S, chunk % 2, tx)
                    T.wait_wgmma(0)
                    for i, j in T.Parallel(ROWS, C):
                        error[i, j] = m.factors[s, 1, j] * (
                            values[i, j] + m.through[s, j] * known[i, j]
                        )
                    T.wgmma_gemm(error, m.A[s, :, :], U, transpose_B=True, clear_accum=True)
                    T.wait_wgmma(0)
                    T.copy(U, U_half)
                    T.barrier_wait(left, chunk % 2 ^ 1)
                    store(U_half, m.U, 0, tx)
                    for i, j in T.Parallel(ROWS, C):
                        U_half[i, j] = m.onto[s, j] * U[i, j]
                    T.wgmma_gemm(U_half, m.k[s, :, :], S)
                    fence()
                    T.barrier_arrive(staged)
                    T.wait_wgmma(0)
                    T.barrier_arrive(used[s])
            else:
                T.set_max_nreg(REGISTERS[1], 0)
                if tx < 128 + 32:
                    for chunk in T.serial(chunks):
                        s = chunk % STAGES
                        T.barrier_wait(used[s], chunk // STAGES % 2 ^ 1)
                        wait_for_cluster(pace, chunk, tx == 128)
                        load(
                            k, v, factors, norms, inverse, m, full, batch, start + chunk * C,
                            slot + chunk, head, kh, first, s,
                        )  # fmt: skip
                elif tx < 128 + 64:
                    for chunk in T.serial(chunks):
                        T.barrier_wait(staged, chunk % 2)
                        to = slot + chunk, head, slice(first, first + ROWS)
                        T.tma_copy(m.S[chunk % 2, :, :], S_out[*to, :], leader_scope_threads=32)
                        T.tma_copy(m.U[0, :, :], U_out[*to, :], leader_scope_threads=32)
                        T.tma_store_wait(0)
                        T.barrier_arrive(left)
                else:
                    for chunk in T.serial(chunks):
                        s = chunk % STAGES
                        T.barrier_wait(used[s], chunk // STAGES % 2 ^ 1)
                        T.barrier_wait(full[s], chunk // STAGES % 2)
                        find_factors(m, s, tx - 128 - C)
                        T.barrier_arrive(factored[s])

    return states_kernel
