"""Checks a folder of compiled kernels, and removes what older versions left in it."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import prebuilt

AT_WORK = 600.0
"""Seconds in which another process may still be writing what belongs to a file."""
_OURS = re.compile(
    r"[A-Za-z_]\w*-[0-9a-f]{24}\.so|\.[A-Za-z_]\w*-[0-9a-f]{24}\.lock|\.gdn-\w{8}\.part"
)
"""Names of libraries, locks and unfinished files."""


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
    what ended processes left. Files that processes may be writing now are not among them, nor are
    those that have no name of ours."""
    entries = list(_entries(folder))
    old = [path for path, entry in entries if entry.versions != prebuilt.versions()]
    named = {entry.file for _, entry in entries if entry.versions == prebuilt.versions()}
    for path in folder.glob("*"):
        if _OURS.fullmatch(path.name) and path.name not in named and _is_old(path):
            old.append(path)
    return old


def _entries(folder: Path) -> Iterator[tuple[Path, prebuilt.Entry]]:
    """The entries of a folder, of all versions. What is none is passed over; `check` names it."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield path, prebuilt.parse_entry(path.read_bytes())


def _is_old(path: Path) -> bool:
    """Whether no process can still be at work on a file, or in a folder."""
    return _written(path) < time.time() - AT_WORK


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return math.inf


def old_caches() -> list[Path]:
    """The folders of the cache that belong to other versions, and that no process has added a
    kernel to lately."""
    now = prebuilt.cache_folder()
    others = [] if now is None else (x for x in now.parent.glob("*") if x.name != now.name)
    return sorted(x for x in others if _is_old(x))


def size(paths: Iterable[Path]) -> int:
    """Bytes in files and folders. What another process removes meanwhile may count or not."""
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            for file in path.rglob("*") if path.is_dir() else (path,):
                with contextlib.suppress(FileNotFoundError):
                    total += file.stat().st_size if file.is_file() else 0
    return total


def prune(folder: Path | None) -> tuple[int, int]:
    """Remove the `leftovers` of a folder; None: those of the cache, and `old_caches`. Returns how
    many files and folders, and their bytes. ValueError for a folder without an entry."""
    if folder is not None and next(_entries(folder), None) is None:
        raise ValueError(f"{folder} has no entry of a kernel, so nothing is removed from it")
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
