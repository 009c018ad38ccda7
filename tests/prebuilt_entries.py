"""One entry of a folder of kernels, whose library is no library, for tests of such folders."""

from __future__ import annotations

from pathlib import Path

from gdn.backends.tilelang import prebuilt
from gdn.backends.tilelang.kernels import KERNELS, Job

JOB: Job = (KERNELS["scan"], {"K": 64, "dtype": "bfloat16", "pool": None})


def write(folder: Path, library: bytes = b"code") -> Path:
    return prebuilt.write_entry(folder, JOB[0].name, JOB[1], ["float32[4]"], library)


def find() -> tuple[str, Path] | None:
    return prebuilt.find(JOB[0].name, JOB[1])


def entry_of(folder: Path) -> Path:
    return folder / f"{prebuilt.key(JOB[0].name, JOB[1])}.json"
