"""Loads of neighbouring numbers from memory."""

from __future__ import annotations

from typing import Any

import tilelang.language as T


@T.macro
def load_run(to: Any, at: Any, source: Any, index: Any, n: int, wide: bool) -> None:
    """to[at : at + n] = n neighbouring numbers of source from `index` on; in one access if wide and
    they are 8 or 16 bytes."""
    bits = n * to.dtype.bits if wide else 0
    if bits == 128:
        to[T.Ramp(at, 1, n)] = T.reinterpret(f"{to.dtype}x{n}", T.ldg128(source[index]))
    elif bits == 64:
        to[T.Ramp(at, 1, n)] = T.reinterpret(f"{to.dtype}x{n}", T.ldg64(source[index]))
    else:
        for e in T.unroll(n):
            to[at + e] = source[(*index[:-1], index[-1] + e)]
