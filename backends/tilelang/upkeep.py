"""Checks a folder of compiled kernels, and removes what older versions left in it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from . import prebuilt

AT_WORK = 600.0
"""Seconds in which another process may still be writing what belongs to a file."""


def check(folder: Path) -> tuple[int, list[str]]:
    """Load every entry of a folder, without a GPU, a compiler or an import of tilelang. Returns how
    many there are, and what is wrong with each bad one."""
    wrong = []
    paths = sorted(folder.glob("*.json"))
    for path in paths:
        try:
            entry = prebuilt.read_entry(path)
            assert entry is not None
            if path.stem != prebuilt.key_of(entry.name):
                raise prebuilt.KernelFileError(f"{path} is of another kernel, {entry.name}")
            prebuilt.load(folder / entry.file)
        except Exception as error:
            wrong.append(str(error) if str(path.parent) in str(error) else f"{path}: {error}")
    return len(paths), wrong


def leftovers(folder: Path) -> list[Path]:
    """Files of a folder that no call of these versions can use: entries of other versions (of gdn,
    TileLang, the sources of kernels, or the processor), libraries that no other entry names, and
    what ended processes left. Files that processes may be writing now are not among them."""
    old: list[Path] = []
    named: set[str] = set()
    for path in folder.glob("*.json"):
        try:
            entry = prebuilt.parse_entry(path.read_bytes())
        except (OSError, ValueError, TypeError):
            continue  # no entry; `check` says so
        if entry.versions == prebuilt.versions():
            named.add(entry.file)
        else:
            old.append(path)
    latest = time.time() - AT_WORK
    for pattern in ("*.so", ".*.part", ".*.lock"):
        old += (x for x in folder.glob(pattern) if x.name not in named and _written(x) < latest)
    return old


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return math.inf


def old_caches() -> list[Path]:
    """The folders of the cache that belong to other versions."""
    now = prebuilt.cache_folder()
    return [] if now is None else sorted(x for x in now.parent.glob("*") if x.name != now.name)


def size(paths: Iterable[Path]) -> int:
    """Bytes in files and folders."""
    every = (y for x in paths for y in (x.rglob("*") if x.is_dir() else (x,)))
    return sum(x.stat().st_size for x in every if x.is_file())


def prune(folder: Path | None) -> tuple[int, int]:
    """Remove the `leftovers` of a folder; None: those of the cache, and `old_caches`. Returns how
    many files and folders, and their bytes."""
    place = prebuilt.cache_folder() if folder is None else folder
    old = [] if place is None else leftovers(place)
    if folder is None:
        old += old_caches()
    freed = size(old)
    for path in old:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(old), freed
