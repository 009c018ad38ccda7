"""The first chunk of each piece that matters after it, for the transfer scan of `scan.py`; or in
reverse how many chunks matter before it, for backward's first scan.

Reads k [B, L, H, K], g and beta [B, L, HV]; with a decay per channel g [B, L, HV, K], and of
`prepare_channels` the decays of whole chunks. Writes first [pieces, HV]: the number of a chunk in
its piece, or -1 where nothing is forgotten (`forgetting.py`); in reverse a number of chunks.

Thread block (piece, value head).
"""

from typing import Any

import tilelang.language as T

from gdn.problem import CHUNK as C

from ..compile import kernel
from ..tile.indexing import strided
from ..tile.largest import PRELUDE as LARGEST
from .channel_forgetting import sum_channel_bounds
from .forgetting import ForgettingSmem, find_first_chunk, search
from .fused_memory import CHUNKS, FIELDS, find_task

WARPS = 16


@T.macro
def write_first(first: Any, piece: Any, head: Any, task: Any, found: Any, reverse: bool) -> None:
    """What `search` has found; by one thread."""
    if task[CHUNKS] > 0:
        first[piece, head] = task[CHUNKS] - T.max(found[0], 0) if reverse else found[0]


@T.macro
def find_piece(
    task: Any, piece: Any, head: Any, cu_seqlens: Any, sequences: Any, L: Any, H: Any, HV: Any,
    length: Any, varlen: bool, thread: Any,
) -> None:  # fmt: skip
    """Fill `task`; by all threads."""
    if thread == 0:
        find_task(
            task, piece, head, 0, cu_seqlens, sequences, L, H, HV, length, varlen, True, False,
            False, None, None, 0, 0, None,
        )  # fmt: skip
    T.sync_threads()


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
            find_piece(task, piece, head, cu_seqlens, sequences, L, H, HV, length, varlen, tx)
            find_first_chunk(
                k, g, beta, A_log, dt_bias, ForgettingSmem(WARPS), task, found, tx // 32, tx % 32,
                varlen, l2, gate, bias, sigmoid, double, reverse,
            )  # fmt: skip
            if tx == 0:
                write_first(first, piece, head, task, found, reverse)

    return first_chunks_kernel


@kernel(own_barriers=True)
def first_channel_chunks(
    *, dtype: str, gates: str, strengths: str, offsets: str, K: int, varlen: bool, l2: bool,
    gate: bool, bias: bool, sigmoid: bool, double: bool, A_log: bool, lower_bound: float | None,
    reverse: bool,
) -> Any:  # fmt: skip
    """Build the kernel of a decay per channel. Options: those of `first_chunks`, and A_log, whether
    there is one, and lower_bound of the fused gate."""
    B, L, H, HV = (T.dynamic(name) for name in ("B", "L", "H", "HV"))
    pieces, bounds, slots, rows = (T.dynamic(x) for x in ("pieces", "bounds", "slots", "rows"))
    has_A_log = A_log

    @T.prim_func
    def first_channel_chunks_kernel(
        k: strided("k", (B, L, H, K), dtype), g: T.Tensor((B, L, HV, K), gates),
        beta: strided("beta", (B, L, HV), strengths), A_log: T.Tensor((HV,), "float32"),
        dt_bias: T.Tensor((HV, K), "float32"), cu_seqlens: T.Tensor((bounds,), offsets),
        scan_factors: T.Tensor((slots, HV, rows, C), "float32"),
        first: T.Tensor((pieces, HV), "int32"), sequences: T.int32, length: T.int32,
    ):  # fmt: skip
        """length: tokens of a piece."""
        with T.Kernel(pieces * HV, threads=32 * WARPS, prelude=LARGEST) as cta:
            task = T.alloc_shared((FIELDS,), "int32")
            found = T.alloc_local((1,), "int32")
            tx = T.get_thread_binding()
            piece, head = cta // HV, cta % HV
            smem = ForgettingSmem(WARPS)
            find_piece(task, piece, head, cu_seqlens, sequences, L, H, HV, length, varlen, tx)
            search(
                task, found, smem.sums, tx // 32, 2, reverse, sum_channel_bounds,
                k, g, beta, A_log, dt_bias, scan_factors, smem, task, tx // 32, tx % 32,
                varlen, l2, gate, bias, sigmoid, double, has_A_log, lower_bound,
            )  # fmt: skip
            if tx == 0:
                write_first(first, piece, head, task, found, reverse)

    return first_channel_chunks_kernel


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
