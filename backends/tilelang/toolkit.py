"""Which CUDA is here: that of the driver, and that of nvcc. Needs no import of tilelang."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess


@functools.cache
def driver() -> int | None:
    """The major version of CUDA that the driver is of; None without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value // 1000


def nvcc_version(path: str | None = None) -> int:
    """The major version of the nvcc at a path, or of the one that kernels are compiled by. 0 if
    there is none, or it does not say."""
    path = path or find_nvcc()
    return _version_of(path) if path else 0


@functools.cache
def _version_of(nvcc: str) -> int:
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return 0
    found = re.search(r"release (\d+)\.", done.stdout)
    return int(found.group(1)) if found else 0


def find_nvcc() -> str | None:
    """The path of nvcc, where TileLang looks for it, in its order."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places: list[str | None] = [os.path.join(home, "bin") for home in homes if home]
    for place in [*places, None]:  # None: PATH
        if found := shutil.which("nvcc", path=place):
            return found
    return _nvcc_of_wheel() or shutil.which("nvcc", path="/usr/local/cuda/bin")


@functools.cache  # it reads what every installed distribution says of itself
def _nvcc_of_wheel() -> str | None:
    for one in importlib.metadata.distributions():
        if one.name.lower() == "nvidia-cuda-nvcc":
            return next((str(x.locate()) for x in one.files or () if x.name == "nvcc"), None)
    return None
