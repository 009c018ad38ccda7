"""Launching a kernel with the configuration measured for it, and with little work on the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .piece_length import BLOCK
from .tiles import INTERPRETED

WALKS = ("scan_kernel", "reverse_scan_kernel", "carry_kernel", "decode_kernel")


class Configuration(NamedTuple):
    """Columns of V a program (or a step of its loop), warps, pipeline stages, registers a thread
    at most (None: what the compiler takes)."""

    BV: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


SEARCHED: dict[str, list[tuple[int, ...]]] = {
    "prepare_kernel": [(0, 4, 1, 128), (0, 4, 1, 168), (0, 4, 1), (0, 8, 1)],
    "carry_kernel": [(16, 4, 1), (16, 4, 2), (32, 4, 1)],
    "scan_kernel": [(BV, w, n) for BV, w in ((64, 4), (64, 8), (128, 8)) for n in (1, 2, 3)],
    "query_gradients_kernel": [(BV, w, n) for BV in (64, 128) for w in (4, 8) for n in (1, 2)],
}
SEARCHED["reverse_scan_kernel"] = SEARCHED["scan_kernel"]
SEARCHED["key_gradients_kernel"] = SEARCHED["query_gradients_kernel"]
"""What GDN_TRITON_AUTOTUNE=1 tries. Not decode: each run of it moves the states on."""


def configuration(name: str, BK: int, itemsize: int, walks: int, room: int) -> Configuration:
    """The configuration of a kernel, as measured on an H200 with bfloat16 and K = V = 128.

    BK is K padded, itemsize the bytes of an element, walks the number of sequences (or pieces of
    them) times value heads, room the bytes of shared memory that a program can have.
    """
    wide = itemsize > 2 or BK > 128
    if name == "prepare_kernel":
        return Configuration(0, 4, 1, None if wide else 168)
    if name == "decode_kernel":
        return Configuration(8 if walks < 128 else 32, 1 if walks < 128 else 4, 1)
    if name == "carry_kernel":
        return Configuration(16, 4, 2 if room > 150_000 else 1)
    if name.endswith("gradients_kernel"):
        return Configuration(BLOCK if wide or room < 230_000 else 2 * BLOCK, 8, 1)
    if wide:
        return Configuration(32, 8, 1)
    if room < 230_000:
        return Configuration(32, 4, 2 if room > 100_000 else 1)
    if name == "scan_kernel":
        return Configuration(2 * BLOCK, 8, 3) if walks >= 128 else Configuration(BLOCK, 4, 3)
    return Configuration(BLOCK, 8, 3)


class Stage:
    """A kernel with all that calls of one kind give it, sizes and constants, so that Triton's own
    look-up of the compiled kernel is needed once, and launching it takes pointers alone."""

    def __init__(
        self,
        kernel: Any,
        programs: int,
        chosen: Configuration,
        sizes: tuple[int, ...] = (),
        **constants: Any,
    ) -> None:
        self.kernel, self.programs, self.sizes, self.constants = kernel, programs, sizes, constants
        self.launch: Callable[..., None] | None = None
        self.choose(chosen)

    def choose(self, chosen: Configuration) -> None:
        """Take a configuration."""
        name, constants = self.kernel.fn.__name__, dict(self.constants)
        self.grid, self.options = self.programs, {
            "num_warps": chosen.num_warps, "num_stages": chosen.num_stages,
        }  # fmt: skip
        if chosen.BV:
            constants["BV"] = chosen.BV
        if name in WALKS:
            rows = constants["V"] + (constants["K"] if constants.get("TRANSFER") else 0)
            self.grid *= triton.cdiv(rows, chosen.BV)
        if chosen.maxnreg:
            self.options["maxnreg"] = chosen.maxnreg
        self.bound = {n: constants[n] for n in self.kernel.arg_names if n in constants}

    def run(self, *args: Any) -> Any:
        return self.kernel[(self.grid,)](*args, *self.sizes, **self.bound, **self.options)

    def search(self, *args: Any) -> None:
        """Take the configuration that is fastest on these arguments."""
        times = {}
        for candidate in (Configuration(*c) for c in SEARCHED[self.kernel.fn.__name__]):
            if self.constants.get("V", 0) < candidate.BV:
                continue
            self.choose(candidate)
            try:
                times[candidate] = triton.testing.do_bench(lambda: self.run(*args), rep=20)
            except OutOfResources:
                continue
        self.choose(min(times, key=lambda candidate: times[candidate]))

    def __call__(self, tensors: Sequence[Tensor | None], *scale: float) -> None:
        """Run the kernel on its tensors and, where it takes one, the scale."""
        pointers, bits = [], 0
        for x in tensors:
            pointer = None if x is None else x.data_ptr()
            pointers.append(pointer)
            bits |= pointer or 0
        aligned = not bits % 16  # Triton compiles apart for pointers that are not
        if aligned and self.launch is not None:
            self.launch(*pointers, *scale)
            return
        searched = self.kernel.fn.__name__ in SEARCHED and not INTERPRETED
        if searched and os.environ.get("GDN_TRITON_AUTOTUNE") == "1":
            self.search(*tensors, *scale)
        compiled = self.run(*tensors, *scale)
        if aligned and not INTERPRETED:
            self.launch = _launcher(compiled, self.grid, (*self.sizes, *self.bound.values()))


def _launcher(compiled: Any, grid: int, rest: tuple[Any, ...]) -> Callable[..., None]:
    """What Triton does to launch a compiled kernel on the current device's stream, without the
    hooks of its profiler, and on pointers, which it need not ask the driver about."""
    driver, device = triton.runtime.driver.active, torch.cuda.current_device()
    run, stream_of = compiled.run, driver.get_current_stream
    flags: tuple[Any, ...] = ()
    if triton.__version__.startswith("3.6.") and not (
        run.global_scratch_size or run.profile_scratch_size
    ):  # past the part in Python, which allocates scratch memory
        run, flags = run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None)
    head = (compiled.function, *flags, compiled.packed_metadata, None, None, None)

    def launch(*args: Any) -> None:
        run(grid, 1, 1, stream_of(device), *head, *args, *rest)

    return launch
