"""Lets one process at a time build a kernel of a folder. The others wait, and find it built."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 120.0
"""Seconds to wait for another process. After these a kernel is built without a lock:
NCCL's ranks give up on each other after 600."""
PAUSE = 0.05


@contextlib.contextmanager
def take_turn(folder: Path, key: str) -> Iterator[None]:
    """Hold the lock of a key while the body runs.

    The system drops the lock of a process that ends, however it ends. Where there can be no lock,
    because the folder cannot be written or its file system has none, the body runs without one.
    """
    path = folder / f".{key}.lock"
    handle = _lock(path)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)  # a process that waits for this file sees that, and makes another
            os.close(handle)


def _lock(path: Path) -> int | None:
    """A descriptor of the file at path, locked; None if that is not possible."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                with contextlib.suppress(OSError):
                    os.utime(handle)  # a file that an ended process left must not look old
                return handle
        except BlockingIOError:
            time.sleep(PAUSE)
        except OSError:
            os.close(handle)
            return None
        os.close(handle)
    return None


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
