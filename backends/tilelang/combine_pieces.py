"""The states between the pieces of a sequence, a program a sequence, value head and part of V.

    S^T <- S^T M^T + N^T over the pieces, in order

where a piece leaves N from a zero state (the first one: from the real state), and M takes the state
before it to what that leaves after it. Reads N^T and M^T as `scan.py` writes them, one under the
other, [pieces, HV, V + K, K]; writes the state that each piece begins with, [pieces, HV, V, K].
Everything is float32.

Backward (REVERSE) goes from the last piece to the first, dS^T <- dS^T M + dN^T, where a piece hands
back dN, `own`, of a zero gradient; and writes the gradient that each piece ends with, and that of
the first state.
"""

from typing import Any

import tilelang.language as T

from .compile import kernel

COLUMNS = 8
"""Columns of V in a program: as few as keep all multiprocessors busy with eight heads."""
PARTS = 4
"""Groups of threads among which a sum over K is divided: pieces follow one another, so that what
counts is the time of one."""
OWN = COLUMNS // PARTS


@kernel(own_barriers=True)
def combine_pieces(
    *, offsets: str, K: int, V: int, varlen: bool, initial: bool, final: bool, v_first: bool,
    reverse: bool,
) -> Any:  # fmt: skip
    """See the module. initial: whether there is a state to begin with, `begin`; final: whether what
    comes out in the end is wanted, `end` (reverse)."""
    HV, N, pieces, bounds = (T.dynamic(name) for name in ("HV", "N", "pieces", "bounds"))
    state = (N, HV, V, K) if v_first else (N, HV, K, V)
    blocks = V // COLUMNS

    @T.macro
    def fetch(walked, own, left, M, at, head, mine, column, part):
        for i in T.unroll(OWN):
            left[i] = (own if reverse else walked)[at, head, mine + i, column]
        if reverse:  # along a row of M, four numbers an access
            for k in T.unroll(K // PARTS // 4):
                for j in T.vectorized(4):
                    M[k * 4 + j] = walked[at, head, V + column, part * (K // PARTS) + k * 4 + j]
        else:
            for k in T.unroll(K // PARTS):
                M[k] = walked[at, head, V + part * (K // PARTS) + k, column]

    @T.prim_func
    def carry_kernel(
        walked: T.Tensor((pieces, HV, V + K, K), "float32"),
        own: T.Tensor((pieces, HV, V, K), "float32"),
        begins: T.Tensor((pieces, HV, V, K), "float32"), begin: T.Tensor(state, "float32"),
        end: T.Tensor(state, "float32"), cu_seqlens: T.Tensor((bounds,), offsets),
        sequences: T.int32, total: T.int32, length: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece; total: of a sequence, where all are alike."""
        with T.Kernel(sequences * HV * blocks, threads=(K, PARTS)) as program:
            # a thread has a column of S^T, and of what pieces leave, in OWN rows, and multiplies
            # with a part of M's
            column, part = T.get_thread_binding(0), T.get_thread_binding(1)
            S, left = (T.alloc_local((OWN,), "float32") for _ in range(2))
            sums = T.alloc_local((COLUMNS,), "float32")
            M, next_M = (T.alloc_local((K // PARTS,), "float32") for _ in range(2))
            turned = T.alloc_shared((K, COLUMNS), "float32")  # S^T, turned
            partial = T.alloc_shared((PARTS, COLUMNS, K), "float32")
            # variables, so that no access divides again
            n, head, mine, piece, last, at = (T.alloc_var("int32") for _ in range(6))
            n = program // (HV * blocks)
            head = program // blocks % HV
            mine = program % blocks * COLUMNS + part * OWN
            start = T.cast(cu_seqlens[n], "int32") if varlen else 0
            tokens = T.cast(cu_seqlens[n + 1], "int32") - start if varlen else total
            last = T.max(T.ceildiv(tokens, length) - 1, 0)
            piece = start // length + n if varlen else n * (last + 1)
            for i in T.unroll(OWN):
                S[i] = 0.0
                if initial:
                    if v_first:
                        S[i] = begin[n, head, mine + i, column]
                    else:
                        S[i] = begin[n, head, column, mine + i]
            at = piece + (last if reverse else 0)
            fetch(walked, own, left, next_M, at, head, mine, column, part)
            for step in T.serial(last + 1):
                for i in T.unroll(OWN):
                    begins[at, head, mine + i, column] = S[i]
                    turned[column, part * OWN + i] = S[i]
                if step < last or final:
                    for i in T.unroll(OWN):
                        S[i] = left[i]
                    for k in T.unroll(K // PARTS):
                        M[k] = next_M[k]
                    at += -1 if reverse else 1
                    if step < last:
                        fetch(walked, own, left, next_M, at, head, mine, column, part)
                    T.sync_threads()
                    for i in T.unroll(COLUMNS):
                        sums[i] = 0.0
                    if reverse or step > 0:
                        for k in T.unroll(K // PARTS):
                            for i in T.unroll(COLUMNS):
                                sums[i] += turned[part * (K // PARTS) + k, i] * M[k]
                    for i in T.unroll(COLUMNS):
                        partial[part, i, column] = sums[i]
                    T.sync_threads()
                    for p in T.unroll(PARTS):
                        for i in T.unroll(OWN):
                            S[i] += partial[p, part * OWN + i, column]
            if final:
                for i in T.unroll(OWN):
                    if v_first:
                        end[n, head, mine + i, column] = S[i]
                    else:
                        end[n, head, column, mine + i] = S[i]

    return carry_kernel
