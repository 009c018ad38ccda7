"""Marks the time that a thread spends in a library which gdn calls, and which may call gdn: fla,
once gdn is registered there (`gdn.integrations.fla`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Outside(threading.local):
    depth = 0


_outside = _Outside()


@contextmanager
def calling_out() -> Iterator[None]:
    """Within the block this thread runs another library's code, which must not come back to gdn."""
    _outside.depth += 1
    try:
        yield
    finally:
        _outside.depth -= 1


def is_calling_out() -> bool:
    """Whether this thread is in a `calling_out` block."""
    return _outside.depth > 0
