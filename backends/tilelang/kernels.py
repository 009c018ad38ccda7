"""All kernels by name. Their own modules, which import tilelang, are imported only to compile."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

from . import toolkit
from .parsing import until_parsed_alone


class Kernel:
    """A kernel by name. A call with its static options returns it compiled by TileLang."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module

    @property
    def compiled(self) -> Any:
        """The function that its module defines (`compile.kernel`). An import parses macros."""
        module = until_parsed_alone(lambda: importlib.import_module(f".{self.module}", __package__))
        return getattr(module, self.name)

    def __call__(self, **statics: Any) -> Any:
        return self.compiled(**statics)


Job = tuple[Kernel, dict[str, Any]]
"""A kernel and its static options."""

channel_gradients = Kernel("channel_gradients", "backward.channel_gradients")
reverse_gradients = Kernel("reverse_gradients", "backward.reverse_gradients")
gradients = Kernel("gradients", "backward.gradients")
fused_forward = Kernel("fused_forward", "forward.fused")
prepare_channels = Kernel("prepare_channels", "forward.prepare_channels")
prepare = Kernel("prepare", "forward.prepare")
reverse_scan = Kernel("reverse_scan", "backward.reverse_scan")
scan = Kernel("scan", "forward.scan")
recompute_states = Kernel("recompute_states", "backward.recompute_states")
decode_kernel = Kernel("decode_kernel", "decode.kernel")
combine_pieces = Kernel("combine_pieces", "combine_pieces")
first_chunks = Kernel("first_chunks", "forward.first_chunks")
first_channel_chunks = Kernel("first_channel_chunks", "forward.first_chunks")
gate_sums = Kernel("gate_sums", "backward.gate_sums")
list_sequences = Kernel("list_sequences", "forward.list_sequences")
clear_tail = Kernel("clear_tail", "clear_tail")

KERNELS = {kernel.name: kernel for kernel in globals().values() if isinstance(kernel, Kernel)}
"""By name. Those that take long to compile come first."""


def slowest_first(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in the order in which to start them side by side."""
    order = list(KERNELS)
    return sorted(jobs, key=lambda job: order.index(job[0].name))


def no_compiler() -> str | None:
    """Why kernels cannot be compiled for this machine, or None."""
    if reason := no_nvcc():
        return reason
    now, mine = toolkit.driver(), toolkit.nvcc_version()
    if now is not None and now < mine:
        return (
            f"nvcc is of CUDA {mine} and the driver of CUDA {now}, which cannot load what it "
            f"compiles: update the driver, or take nvcc of CUDA {now}"
        )
    return None


def no_nvcc() -> str | None:
    """Why kernels cannot be compiled for any machine, or None."""
    if importlib.util.find_spec("tilelang") is None:
        return "tilelang cannot be imported"
    return None if toolkit.find_nvcc() else "no nvcc, of CUDA 12 or newer"
