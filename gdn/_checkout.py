"""Makes gdn.backends importable in a checkout, where backends/ lies beside gdn/, not inside it.

An installed package contains gdn/backends, and this module does nothing. In the root of a clone
Python imports ./gdn, even if a gdn package is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent


def find_backends() -> None:
    """Make `gdn.backends` importable from a checkout."""
    folder = HERE.parent / "backends"
    if (HERE / "backends").is_dir() or not (folder / "__init__.py").is_file():
        return
    spec = importlib.util.spec_from_file_location(
        "gdn.backends", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gdn.backends"] = sys.modules["gdn"].backends = module  # type: ignore[attr-defined]
    spec.loader.exec_module(module)
