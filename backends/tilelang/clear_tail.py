"""Zeros for the tokens past the last sequence of a packed call: padding of a captured graph.

    writes  dv [B, L, HV, V]; dq, dk [B, L, H, K]; dg [B, L, HV or HV K]; dbeta [B, L, HV] from
            token cu_seqlens[N] on; in forward only o, in dv's place
            tasks [1], a counter for the kernel after this one (`forward/fused_tasks.py`)

The first argument must be a tensor, since TileLang launches on its device (on GPU 0 if it is None).
All thread blocks take tokens in turn. Where sequences end at L there are none.
"""

from typing import Any

import tilelang.language as T

from .compile import kernel
from .tile.indexing import token_bound

BLOCKS, THREADS, RUN = 264, 128, 8
"""Thread blocks, their threads, and elements that a thread writes at once."""


@kernel
def clear_tail(
    *, dtype: str, K: int, V: int, gates: str, strengths: str, offsets: str, backward: bool,
    counter: bool = False,
) -> Any:  # fmt: skip
    """Build the kernel. gates, strengths: dtypes of dg and dbeta; counter: whether there is one."""
    B, L, H, HV, G, bounds = (T.dynamic(name) for name in ("B", "L", "H", "HV", "G", "bounds"))

    @T.macro
    def clear_rows(x, token, heads, width, thread):
        for i in T.serial(T.ceildiv(heads * width, THREADS * RUN)):
            element = (i * THREADS + thread) * RUN
            if element < heads * width:
                for j in T.vectorized(RUN):
                    x[0, token, element // width, element % width + j] = 0

    @T.macro
    def clear_scalars(x, token, heads, thread):
        for i in T.serial(T.ceildiv(heads, THREADS)):
            if i * THREADS + thread < heads:
                x[0, token, i * THREADS + thread] = 0

    @T.prim_func
    def clear_tail_kernel(
        dv: T.Tensor((B, L, HV, V), dtype), dq: T.Tensor((B, L, H, K), dtype),
        dk: T.Tensor((B, L, H, K), dtype), dg: T.Tensor((B, L, G), gates),
        dbeta: T.Tensor((B, L, HV), strengths), cu_seqlens: T.Tensor((bounds,), offsets),
        tasks: T.Tensor((1,), "int32"),
    ):  # fmt: skip
        with T.Kernel(BLOCKS, threads=THREADS) as cta:
            thread = T.get_thread_binding()
            if counter:  # noqa: SIM102, known before the kernel is; the next is not
                if T.And(cta == 0, thread == 0):
                    tasks[0] = 0
            first = T.alloc_var("int32")
            first = token_bound(cu_seqlens, bounds - 1, L) + cta
            for step in T.serial(T.ceildiv(T.max(L - first, 0), BLOCKS)):
                clear_rows(dv, first + step * BLOCKS, HV, V, thread)
                if backward:
                    clear_rows(dq, first + step * BLOCKS, H, K, thread)
                    clear_rows(dk, first + step * BLOCKS, H, K, thread)
                    clear_scalars(dg, first + step * BLOCKS, G, thread)
                    clear_scalars(dbeta, first + step * BLOCKS, HV, thread)

    return clear_tail_kernel
