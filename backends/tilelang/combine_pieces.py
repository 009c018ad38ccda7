"""The state at every piece boundary, from what each piece does to any state.

A piece changes the state before it to S^T <- S^T M^T + N^T. Its transfer matrices come from a scan
of all pieces in parallel (`forward/scan.py`): N is the state that it leaves of a zero state, M its
effect on any state. N of the first piece of a sequence already starts from the real state, so M of
that piece is not applied, unless the real state was not known then (`late`). This kernel goes
through the pieces in order:

    forward   S^T <- S^T M^T + N^T      from the first piece to the last
    backward  dS^T <- dS^T M + dN^T     from the last piece to the first (reverse)

dN is the gradient that a piece returns of a zero gradient, and M is forward's. All of it is
float32. Of a piece that forgets (`forward/forgetting.py`) M is zero, and not read where `forgets`
tells.

    reads   transfer [pieces, HV, V + K, K], N^T above M^T; dN [pieces, HV, V, K] (backward);
            forgets [pieces, HV], where there is one; S_in, the initial state (backward: the
            gradient of the final state)
    writes  boundary [pieces, HV, V, K], the state that each piece starts from (backward: the
            gradient of the state that it ends with); S_out, the gradient of the initial state

A thread block has one sequence, one value head and COLUMNS columns of V; its threads are K by
PARTS. A thread has one column of S^T in OWN rows, and sums over one part of K.
"""

from typing import Any

import tilelang.language as T

from .compile import kernel
from .tile.indexing import token_bound
from .tile.pool import READS, declare_slots, declare_states, find_slot
from .tile.pool_kind import PoolKind

COLUMNS = 8
"""Columns of V of a thread block: few enough that eight heads keep all SMs busy."""
PARTS = 4
"""Groups of threads that share a sum over K. The pieces follow one another, so the kernel takes
what one thread takes for one piece, times the pieces."""
OWN = COLUMNS // PARTS


@kernel(own_barriers=True)
def combine_pieces(
    *, offsets: str, K: int, V: int, varlen: bool, initial: bool, final: bool, v_first: bool,
    reverse: bool, forgetting: bool, late: bool = False, pool: PoolKind | None = None,
) -> Any:  # fmt: skip
    """Build the kernel. initial: whether `S_in` holds a state to start from (else zero);
    final: whether `S_out` is wanted (reverse only); forgetting: whether there is `forgets`; late: N
    of a first piece starts from zero; pool: S_in is one (these three forward only)."""
    HV, N, pieces, bounds = (T.dynamic(name) for name in ("HV", "N", "pieces", "bounds"))
    state = (N, HV, V, K) if v_first else (N, HV, K, V)
    blocks, each = V // COLUMNS, K // PARTS
    declared_slots, pooled = declare_slots(pool), pool is not None

    @T.macro
    def load_transfer(transfer, dN, N_next, M_next, piece, head, row, column, part, forgotten):
        for i in T.unroll(OWN):
            N_next[i] = (dN if reverse else transfer)[piece, head, row + i, column]
        if reverse:  # along a row of M: four numbers an access
            for k in T.unroll(each // 4):
                for j in T.vectorized(4):
                    M_next[k * 4 + j] = transfer[piece, head, V + column, part * each + k * 4 + j]
        elif T.Or(not forgetting, forgotten == 0):
            for k in T.unroll(each):
                M_next[k] = transfer[piece, head, V + part * each + k, column]

    @T.prim_func
    def combine_pieces_kernel(
        transfer: T.Tensor((pieces, HV, V + K, K), "float32"),
        dN: T.Tensor((pieces, HV, V, K), "float32"),
        forgets: T.Tensor((pieces, HV), "int32"),
        boundary: T.Tensor((pieces, HV, V, K), "float32"),
        S_in: declare_states("S_in", state, pool),
        S_out: T.Tensor(state, "float32"), cu_seqlens: T.Tensor((bounds,), offsets),
        state_indices: declared_slots[0], fresh: declared_slots[1], null_index: T.int64,
        sequences: T.int32, total: T.int32, length: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece; total: of a sequence if all have equally many, else of all."""
        with T.Kernel(sequences * HV * blocks, threads=(K, PARTS)) as cta:
            column, part = T.get_thread_binding(0), T.get_thread_binding(1)
            S, N_next = (T.alloc_local((OWN,), "float32") for _ in range(2))
            sums = T.alloc_local((COLUMNS,), "float32")
            M, M_next = (T.alloc_local((each,), "float32") for _ in range(2))
            S_smem = T.alloc_shared((K, COLUMNS), "float32")  # S
            partial_smem = T.alloc_shared((PARTS, COLUMNS, K), "float32")
            # variables: an expression would divide again at every use
            n, head, row, first_piece, last, piece = (T.alloc_var("int32") for _ in range(6))
            forgotten, forgotten_next = (T.alloc_var("int32") for _ in range(2))

            # === the place of the thread block, the state to start from ===
            n = cta // (HV * blocks)
            head = cta // blocks % HV
            row = cta % blocks * COLUMNS + part * OWN
            first_token = token_bound(cu_seqlens, n, total, pooled) if varlen else 0
            stop = token_bound(cu_seqlens, n + 1, total, pooled) if varlen else total
            tokens = stop - first_token
            last = T.max(T.ceildiv(tokens, length) - 1, 0)
            first_piece = first_token // length + n if varlen else n * (last + 1)
            begin = T.alloc_local((3,), "int32")
            begin[0] = n
            if pooled:
                find_slot(
                    begin, 0, state_indices, fresh, null_index, S_in.shape[0], n, tokens > 0, pool
                )
            for i in T.unroll(OWN):
                S[i] = 0.0
                if initial and T.Or(not pooled, begin[READS] != 0):
                    if v_first:
                        S[i] = S_in[begin[0], head, row + i, column]
                    else:
                        S[i] = S_in[begin[0], head, column, row + i]

            # === piece after piece ===
            piece = first_piece + (last if reverse else 0)
            forgotten = 0
            forgotten_next = 0
            if forgetting:
                forgotten = forgets[piece, head]
            load_transfer(transfer, dN, N_next, M_next, piece, head, row, column, part, forgotten)
            for step in T.serial(last + 1):
                for i in T.unroll(OWN):
                    boundary[piece, head, row + i, column] = S[i]
                    S_smem[column, part * OWN + i] = S[i]
                if step < last or final:
                    for i in T.unroll(OWN):
                        S[i] = N_next[i]
                    for k in T.unroll(each):
                        M[k] = M_next[k]
                    piece += -1 if reverse else 1
                    if step < last:  # loads of the next piece run beside this one's sums
                        if forgetting:
                            forgotten_next = forgets[piece, head]
                        load_transfer(
                            transfer, dN, N_next, M_next, piece, head, row, column, part,
                            forgotten_next,
                        )  # fmt: skip
                    T.sync_threads()
                    for i in T.unroll(COLUMNS):
                        sums[i] = 0.0
                    if T.And(reverse or late or step > 0, forgotten == 0):
                        for k in T.unroll(each):
                            for i in T.unroll(COLUMNS):
                                sums[i] += S_smem[part * each + k, i] * M[k]
                    for i in T.unroll(COLUMNS):
                        partial_smem[part, i, column] = sums[i]
                    T.sync_threads()
                    for p in T.unroll(PARTS):
                        for i in T.unroll(OWN):
                            S[i] += partial_smem[p, part * OWN + i, column]
                    forgotten = forgotten_next

            # === the state after the last piece ===
            if final:
                for i in T.unroll(OWN):
                    if v_first:
                        S_out[n, head, row + i, column] = S[i]
                    else:
                        S_out[n, head, column, row + i] = S[i]

    return combine_pieces_kernel
