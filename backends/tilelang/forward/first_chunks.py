"""The first chunk of each piece that matters after it, for the transfer scan of a rank's part; or
in reverse how many chunks matter before it, for backward's first scan.

Reads k [B, L, H, K], and g and beta [B, L, HV]. Writes first [pieces, HV]: the number of a chunk in
its piece, or -1 where nothing is forgotten (`forgetting.py`); in reverse a number of chunks.

Thread block (piece, value head).
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.indexing import strided
from .forgetting import ForgettingSmem, find_first_chunk
from .fused_memory import CHUNKS, FIELDS, find_task

WARPS = 16


@kernel(own_barriers=True)
def first_chunks(
    *, dtype: str, gates: str, strengths: str, offsets: str, K: int, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, reverse: bool,
) -> Any:  # fmt: skip
    """Build the kernel. gates, strengths, offsets: dtypes of g, beta, cu_seqlens; l2, gate, bias,
    sigmoid, double: fused options of the call."""
    B, L, H, HV = (T.dynamic(name) for name in ("B", "L", "H", "HV"))
    pieces, bounds = T.dynamic("pieces"), T.dynamic("bounds")

    @T.prim_func
    def first_chunks_kernel(
        k: strided("k", (B, L, H, K), dtype), g: strided("g", (B, L, HV), gates),
        beta: strided("beta", (B, L, HV), strengths), A_log: T.Tensor((HV,), "float32"),
        dt_bias: T.Tensor((HV,), "float32"), cu_seqlens: T.Tensor((bounds,), offsets),
        first: T.Tensor((pieces, HV), "int32"), sequences: T.int32, length: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece."""
        with T.Kernel(pieces * HV, threads=32 * WARPS) as cta:
            task = T.alloc_shared((FIELDS,), "int32")
            found = T.alloc_local((1,), "int32")
            tx = T.get_thread_binding()
            piece, head = cta // HV, cta % HV
            if tx == 0:
                find_task(
                    task, piece, head, 0, cu_seqlens, sequences, L, H, HV, length, varlen, True,
                    False, None, None, 0, 0, None,
                )  # fmt: skip
            T.sync_threads()
            find_first_chunk(
                k, g, beta, A_log, dt_bias, ForgettingSmem(WARPS), task, found, tx // 32, tx % 32,
                varlen, l2, gate, bias, sigmoid, double, reverse,
            )  # fmt: skip
            if T.And(tx == 0, task[CHUNKS] > 0):
                first[piece, head] = (
                    task[CHUNKS] - T.max(found[0], 0) if reverse else found[0]
                )  # fmt: skip

    return first_chunks_kernel


@T.macro
def limit_transfer(task: Any, first: Any, row: Any, V: int, ends: Any, forgetting: bool) -> None:
    """What is not wanted of a transfer scan gets no chunks, which costs nothing; with `forgetting`
    neither do chunks before the first one that matters, and M then, which is zero (`forgets`)."""
    inner = T.And(task.number > 0, task.number < task.last_number)
    N_wanted = T.And(row < V, T.Or(task.number < task.last_number, ends == 2))
    wanted = T.Or(N_wanted, T.And(row >= V, T.Or(inner, ends != 0)))
    task["chunks"] = T.if_then_else(wanted, task.chunks, 0)
    task["forgets"] = 0
    if forgetting:  # noqa: SIM102, known before the kernel is; the next is not
        if task.chunks > 0:
            begin = T.alloc_var("int32")
            begin = first[task.piece, task.head]
            if begin >= 0:
                task["forgets"] = 1
                task["start"] += begin * C
                task["slot"] += begin
                task["chunks"] = T.if_then_else(row < V, task.chunks - begin, 0)
