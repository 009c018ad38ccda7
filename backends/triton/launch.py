"""Choosing a kernel's configuration, and launching it with little host time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .tiles import INTERPRETED

V_BLOCK_KERNELS = ("scan_kernel", "reverse_scan_kernel", "combine_pieces_kernel", "decode_kernel")
"""Kernels that have a program for each block of V. The others loop over the blocks, or use no V."""


ANY_ALIGNMENT = (
    "g", "beta", "A_log", "dt_bias", "cu_seqlens", "indices", "accepted", "fresh",
    "checkpoint_offsets", "checkpoint_indices",
)  # fmt: skip
"""Pointers that kernels read one number at a time, so that their alignment does not matter."""


class Configuration(NamedTuple):
    """How a kernel is compiled.

    BV: columns of V a program, or a step of its loop; 0 if the kernel uses no V.
    num_warps, num_stages: warps a program, and stages of its software pipeline.
    maxnreg: registers a thread at most; None leaves it to the compiler.
    """

    BV: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


AUTOTUNE_CANDIDATES: dict[str, list[tuple[int, ...]]] = {
    "prepare_channels_kernel": [(0, 4, 1), (0, 4, 1, 168), (0, 8, 1), (0, 8, 1, 128)],
    "decay_rows_kernel": [(0, 4, 1), (0, 4, 1, 168), (0, 8, 1)],
    "prepare_kernel": [(0, 4, 1, 128), (0, 4, 1, 168), (0, 4, 1), (0, 8, 1)],
    "combine_pieces_kernel": [(16, 4, 1), (16, 4, 2), (32, 4, 1)],
    "scan_kernel": [(BV, w, n) for BV, w in ((64, 4), (64, 8), (128, 8)) for n in (1, 2, 3)],
    "query_gradients_kernel": [(BV, w, n) for BV in (64, 128) for w in (4, 8) for n in (1, 2)],
}
AUTOTUNE_CANDIDATES["reverse_scan_kernel"] = AUTOTUNE_CANDIDATES["scan_kernel"]
AUTOTUNE_CANDIDATES["key_gradients_kernel"] = AUTOTUNE_CANDIDATES["query_gradients_kernel"]
"""Configurations that GDN_TRITON_AUTOTUNE=1 times. Decode is not among them, since every run of it
changes the states, nor are `chunk_matrices_kernel` and `chunk_rows_kernel`, which write in place of
what they read."""


@functools.cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that a program can have. Other devices than GPUs count as an H200."""
    if device.type != "cuda":
        return 232_448
    properties: Any = torch.cuda.get_device_properties(device)  # torch's annotations lack the field
    return int(properties.shared_memory_per_block_optin)


def choose_configuration(
    name: str, BK: int, itemsize: int, scans: int, shared_memory: int, channels: bool = False
) -> Configuration:
    """The configuration of a kernel, as measured on an H200 with bfloat16 and K = V = 128; of the
    kernels with a decay per channel only the scan's was compared with others.

    BK is K padded to a tile, and itemsize the bytes of an element. scans is the number of sequences
    (or pieces) times value heads. shared_memory is `shared_memory_limit`. channels: a decay per
    channel, with which a scan's stage takes 80 KB and more for 128 columns of V.
    """
    wide = itemsize > 2 or BK > 128
    if name == "prepare_kernel":
        return Configuration(0, 4, 1, None if wide else 168)
    if name in ("prepare_channels_kernel", "decay_rows_kernel"):  # on sm_80 ptxas gives them fewer
        return Configuration(0, 8 if wide else 4, 1, 255)
    if name == "sum_gates_kernel":  # a thread a channel
        return Configuration(0, BK // 32, 1, 80)
    if name == "chunk_rows_kernel":  # on sm_80 it and the next would spill more
        return Configuration(0, 4, 1, 80 if shared_memory > 230_000 else 96)
    if name == "chunk_matrices_kernel":
        return Configuration(0, 4, 1, 128 if shared_memory > 230_000 else 168)
    if name == "find_chunks_kernel":
        return Configuration(0, 4, 1)
    if name == "decode_kernel":
        return Configuration(8 if scans < 128 else 32, 1 if scans < 128 else 4, 1)
    if name == "combine_pieces_kernel":
        return Configuration(16, 4, 2 if shared_memory > 150_000 else 1)
    if name == "channel_gradients_kernel":  # without a limit ptxas gives it 32 registers on sm_80
        return Configuration(64 if wide else 128, 4, 1, 255)
    if name == "norm_gradients_kernel":
        return Configuration(0, 4, 1)
    if name.endswith("gradients_kernel"):
        narrow = wide or channels or shared_memory < 230_000
        return Configuration(64 if narrow else 128, 8, 1)
    if wide:
        return Configuration(32, 8, 1)
    if shared_memory < 230_000:
        return Configuration(32, 4, 2 if shared_memory > 100_000 else 1)
    if name == "scan_kernel":
        if scans < 128:
            return Configuration(64, 4, 3)
        return Configuration(128, 8, 2 if channels else 3)
    return Configuration(64, 8, 3)


def prepared_channels(BK: int, itemsize: int, shared_memory: int) -> int:
    """Channels that `prepare_channels_kernel` has in registers at a time."""
    return BK if BK <= 128 and itemsize == 2 and shared_memory > 230_000 else 64


class Stage:
    """A kernel bound to everything that all calls of one kind share: its sizes and constants.

    The first run goes through Triton, which looks up or compiles the kernel. Later runs launch that
    compiled kernel directly, and pass pointers alone.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        configuration: Configuration,
        sizes: tuple[int, ...] = (),
        **constants: Any,
    ) -> None:
        """programs: how many there are for a block of V. The kernel may take fewer constants."""
        self.kernel, self.programs, self.sizes, self.constants = kernel, programs, sizes, constants
        self.launch_compiled: Callable[..., None] | None = None
        self.can_autotune = kernel.fn.__name__ in AUTOTUNE_CANDIDATES and not INTERPRETED
        self.can_autotune &= not constants.get("POOL")  # runs would change the states
        # the pointers for whose alignment the kernel is compiled; the interpreter knows none
        parameters = getattr(kernel, "params", kernel.arg_names)
        self.checked = [not getattr(x, "do_not_specialize_on_alignment", False) for x in parameters]
        self.configure(configuration)

    def configure(self, configuration: Configuration) -> None:
        """Set the grid, Triton's options and the kernel's constants from a configuration."""
        name, constants = self.kernel.fn.__name__, dict(self.constants)
        self.grid, self.options = self.programs, {
            "num_warps": configuration.num_warps, "num_stages": configuration.num_stages,
        }  # fmt: skip
        if configuration.BV:
            # in the interpreter a program takes as long whatever its width is
            constants["BV"] = BV = max(configuration.BV, 64 if INTERPRETED else 0)
        if name in V_BLOCK_KERNELS:
            rows = constants["V"] + (constants["K"] if constants.get("TRANSFER") else 0)
            self.grid *= triton.cdiv(rows, BV)
        if configuration.maxnreg:
            self.options["maxnreg"] = configuration.maxnreg
        self.kernel_constants = {n: constants[n] for n in self.kernel.arg_names if n in constants}

    def run(self, *args: Any) -> Any:
        """Launch through Triton, and return the compiled kernel."""
        return self.kernel[(self.grid,)](
            *args, *self.sizes, **self.kernel_constants, **self.options
        )

    def compile(self, tensors: Sequence[Tensor | None], *scale: float) -> None:
        """Compile for tensors of these dtypes and alignments, without a launch."""
        if not INTERPRETED:
            self.kernel.warmup(
                *tensors, *scale, *self.sizes, grid=(self.grid,), **self.kernel_constants,
                **self.options,
            )  # fmt: skip

    def autotune(self, *args: Any) -> None:
        """Take the candidate that is fastest on these arguments."""
        times = {}
        for candidate in (Configuration(*c) for c in AUTOTUNE_CANDIDATES[self.kernel.fn.__name__]):
            if self.constants.get("V", 0) < candidate.BV:
                continue
            self.configure(candidate)
            try:
                times[candidate] = triton.testing.do_bench(lambda: self.run(*args), rep=20)
            except OutOfResources:
                continue
        self.configure(min(times, key=lambda candidate: times[candidate]))

    def __call__(self, tensors: Sequence[Tensor | None], *scale: float) -> None:
        """Run the kernel on its tensors and, where it takes one, the scale."""
        pointers, pointer_bits = [], 0
        for x, checked in zip(tensors, self.checked, strict=False):
            pointer = None if x is None else x.data_ptr()
            pointers.append(pointer)
            if checked:
                pointer_bits |= pointer or 0
        aligned = not pointer_bits % 16  # Triton compiles another kernel for unaligned pointers
        if aligned and self.launch_compiled is not None:
            self.launch_compiled(*pointers, *scale)
            return
        if self.can_autotune and os.environ.get("GDN_TRITON_AUTOTUNE") == "1":
            self.autotune(*tensors, *scale)
        compiled = self.run(*tensors, *scale)
        if aligned and not INTERPRETED:
            constants = (*self.sizes, *self.kernel_constants.values())
            self.launch_compiled = _make_launcher(compiled, self.grid, constants)


class CompilingStage(Stage):
    """A stage that compiles where others launch."""

    def __call__(self, tensors: Sequence[Tensor | None], *scale: float) -> None:
        self.compile(tensors, *scale)


def compiles_ahead() -> bool:
    """Whether kernels can be compiled before a launch, for this process's GPU."""
    return not INTERPRETED and torch.cuda.is_available()


def _make_launcher(compiled: Any, grid: int, constants: tuple[Any, ...]) -> Callable[..., None]:
    """A function that launches a compiled kernel on the current device's stream.

    It makes Triton's own call, without the hooks of Triton's profiler. Given pointers in place of
    tensors, the call does not ask the driver where a tensor lies.
    """
    driver, device = triton.runtime.driver.active, torch.cuda.current_device()
    run, current_stream = compiled.run, driver.get_current_stream
    flags: tuple[Any, ...] = ()
    if triton.__version__.startswith("3.6.") and not (
        run.global_scratch_size or run.profile_scratch_size
    ):  # the C function below `run`: the Python around it only allocates scratch memory
        run, flags = run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None)
    head = (compiled.function, *flags, compiled.packed_metadata, None, None, None)

    def launch(*args: Any) -> None:
        run(grid, 1, 1, current_stream(device), *head, *args, *constants)

    return launch
