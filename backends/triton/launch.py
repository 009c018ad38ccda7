"""Launching a kernel with the configuration measured for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton

from .cut import BLOCK


class Configuration(NamedTuple):
    """Columns of V a program (or a step of its loop), warps, pipeline stages, registers a thread
    at most (None: what the compiler takes)."""

    BV: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def configuration(name: str, BK: int, V: int, itemsize: int, walks: int) -> Configuration:
    """The configuration of a kernel, by the padded K, by V, the bytes of an element, and how many
    sequences (or chunks) times heads there are."""
    wide = BK * itemsize > 256
    if name == "prepare_kernel":
        return Configuration(0, 4, 1, None if wide else 168)
    if name == "carry_kernel":
        return Configuration(16, 4, 1)
    if name.endswith("gradients_kernel"):
        return Configuration(BLOCK if wide else 2 * BLOCK, 8, 1)
    return Configuration(BLOCK, 4, 1 if wide else 3 if name == "scan_kernel" else 2)


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run a kernel on `programs` programs, times the blocks of V for those that walk."""
    name = kernel.fn.__name__
    V, BK = constants.get("V", 0), constants.get("BK", 0)
    chosen = configuration(name, BK, V, args[0].element_size(), programs)
    if chosen.BV:
        constants["BV"] = chosen.BV
    if name in ("scan_kernel", "reverse_scan_kernel", "carry_kernel"):
        rows = V + constants["K"] if constants.get("TRANSFER") else V
        programs *= triton.cdiv(rows, chosen.BV)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    if chosen.maxnreg:
        options["maxnreg"] = chosen.maxnreg
    kernel[(programs,)](*args, **constants, **options)
