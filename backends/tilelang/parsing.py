"""TileLang parses the sources of macros and builders, which only one thread may do at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PARSED_TOGETHER = "AST constructor recursion depth mismatch"
"""CPython counts the depth of `ast.parse` for all threads together and raises a SystemError with
this text if one parses while another one does. TileLang also parses while it lowers."""
ATTEMPTS = 8


def until_parsed_alone(make: Callable[[], Any]) -> Any:
    """The result of `make`, which runs again if another thread parses at the same time."""
    for _ in range(ATTEMPTS - 1):
        try:
            return make()
        except Exception as error:  # TVM passes a SystemError on as an error of its own
            if PARSED_TOGETHER not in str(error):
                raise
    return make()
