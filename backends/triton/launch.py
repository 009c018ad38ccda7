"""Launching a kernel with the configuration measured for it: block of V, warps, pipeline stages."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton

SCANS = ("scan_kernel", "reverse_scan_kernel")


class Configuration(NamedTuple):
    """BV columns of V a program (or a step of its loop), warps, and stages of its pipeline."""

    BV: int
    num_warps: int
    num_stages: int


def configuration(name: str, BK: int, V: int, itemsize: int) -> Configuration:
    """The configuration of a kernel, by the padded K, by V, and by the bytes of an element."""
    BV = 64 if V > 32 else 32
    if name == "prepare_kernel":
        return Configuration(0, 4, 1)
    if name.endswith("gradients_kernel"):
        return Configuration(BV, 8, 1)
    return Configuration(BV, 4, 2 if BK * itemsize <= 256 else 1)


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run a kernel on `programs` programs; scans run one more for every further block of V."""
    name = kernel.fn.__name__
    sizes = configuration(name, constants["BK"], constants.get("V", 0), args[0].element_size())
    if sizes.BV:
        constants["BV"] = sizes.BV
    if name in SCANS:
        programs *= triton.cdiv(constants["V"], sizes.BV)
    kernel[(programs,)](*args, **constants, num_warps=sizes.num_warps, num_stages=sizes.num_stages)
