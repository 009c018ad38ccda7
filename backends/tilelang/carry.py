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

from .launch import kernel

COLUMNS = 8


@kernel(own_barriers=True)
def carry(
    *, offsets: str, K: int, V: int, varlen: bool, initial: bool, final: bool, v_first: bool,
    reverse: bool,
) -> Any:  # fmt: skip
    """See the module. initial: whether there is a state to begin with, `begin`; final: whether what
    comes out in the end is wanted, `end` (reverse)."""
    HV, N, pieces, bounds = (T.dynamic(name) for name in ("HV", "N", "pieces", "bounds"))
    state = (N, HV, V, K) if v_first else (N, HV, K, V)
    blocks = V // COLUMNS

    @T.prim_func
    def carry_kernel(
        walked: T.Tensor((pieces, HV, V + K, K), "float32"),
        own: T.Tensor((pieces, HV, V, K), "float32"),
        begins: T.Tensor((pieces, HV, V, K), "float32"), begin: T.Tensor(state, "float32"),
        end: T.Tensor(state, "float32"), cu_seqlens: T.Tensor((bounds,), offsets),
        sequences: T.int32, total: T.int32, length: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece; total: of a sequence, where all are alike."""
        with T.Kernel(sequences * HV * blocks, threads=K) as program:
            column = T.get_thread_binding()  # of S^T: a thread has it in all of the rows
            S = T.alloc_local((COLUMNS,), "float32")
            row = T.alloc_shared((K, COLUMNS), "float32")  # S^T, turned
            # variables, so that no access divides again
            n, head, first, piece, last, at = (T.alloc_var("int32") for _ in range(6))
            n = program // (HV * blocks)
            head = program // blocks % HV
            first = program % blocks * COLUMNS
            start = T.cast(cu_seqlens[n], "int32") if varlen else 0
            tokens = T.cast(cu_seqlens[n + 1], "int32") - start if varlen else total
            last = T.max(T.ceildiv(tokens, length) - 1, 0)
            piece = start // length + n if varlen else n * (last + 1)
            for i in T.unroll(COLUMNS):
                S[i] = 0.0
                if initial:
                    if v_first:
                        S[i] = begin[n, head, first + i, column]
                    else:
                        S[i] = begin[n, head, column, first + i]
            for step in T.serial(last + 1):
                at = piece + (last - step if reverse else step)
                for i in T.unroll(COLUMNS):
                    begins[at, head, first + i, column] = S[i]
                if step < last or final:
                    for i in T.vectorized(COLUMNS):
                        row[column, i] = S[i]
                    T.sync_threads()
                    for i in T.unroll(COLUMNS):
                        if reverse:
                            S[i] = own[at, head, first + i, column]
                        else:
                            S[i] = walked[at, head, first + i, column]
                    if reverse:  # along a row of M, four numbers an access
                        four = T.alloc_local((4,), "float32")
                        for k in T.unroll(K // 4, unroll_factor=8):
                            for j in T.vectorized(4):
                                four[j] = walked[at, head, V + column, k * 4 + j]
                            for j in T.unroll(4):
                                for i in T.unroll(COLUMNS):
                                    S[i] += row[k * 4 + j, i] * four[j]
                    elif step > 0:
                        for k in T.unroll(K, unroll_factor=32):
                            factor = T.alloc_var("float32")
                            factor = walked[at, head, V + k, column]
                            for i in T.unroll(COLUMNS):
                                S[i] += row[k, i] * factor
                    T.sync_threads()
            if final:
                for i in T.unroll(COLUMNS):
                    if v_first:
                        end[n, head, first + i, column] = S[i]
                    else:
                        end[n, head, column, first + i] = S[i]

    return carry_kernel
