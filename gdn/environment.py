"""Environment variables that every call reads."""

from __future__ import annotations

import functools
import os
from typing import Any

# CPython's dict behind os.environ. os.environ itself raises and catches an error for a missing name
# and decodes a present one, which takes up to half of the time that choosing a backend may take
_variables: Any = getattr(os.environ, "_data", os.environ)
_decode = functools.cache(os.fsdecode)


class Variable:
    """An environment variable."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._key: Any = name if _variables is os.environ else os.environ.encodekey(name)

    def read(self) -> str | None:
        """Its value now; None if it is not set or empty."""
        value = _variables.get(self._key)
        return _decode(value) if value else None
