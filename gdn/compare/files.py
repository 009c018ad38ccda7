"""Files that the command lines write: checked before anything is measured, and JSON without NaN."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any


def require_writable(option: str, path: Path) -> None:
    """ValueError unless the file that an option names can be written. Nothing is created."""
    target = Path(os.path.realpath(path))  # of a link, the file that it leads to
    folder = target.parent
    why = None
    if target.is_dir():
        why = "which is a folder; add a file name"
    elif not folder.is_dir():
        why = f"but there is no folder {folder}; make it first"
    elif not os.access(target if target.exists() else folder, os.W_OK):
        why = "which you may not write; choose another place"
    if why is not None:
        raise ValueError(f"{option} must name a file that can be written, got {path}, {why}")


def require_folder(option: str, path: Path) -> None:
    """ValueError if the folder that an option names is a file, or below one, and so cannot be
    made."""
    target = Path(os.path.realpath(path))
    found = next(x for x in (target, *target.parents) if x.exists())
    if not found.is_dir() or not os.access(found, os.W_OK):
        why = "may not be written" if found.is_dir() else "is a file"
        raise ValueError(
            f"{option} must name a folder that can be made, got {path}, but {found} {why}; "
            "choose another place"
        )


def require_matplotlib(what: str) -> None:
    """ValueError unless matplotlib is installed, which `what` needs."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f'{what} needs matplotlib, which is not installed; pip install "gdn[plot]"'
        )


def require_picture(option: str, path: Path) -> None:
    """ValueError unless the picture that an option names can be written, in a format that
    matplotlib knows."""
    require_matplotlib(option)
    require_writable(option, path)
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.filetypes
    if path.suffix.lower().removeprefix(".") not in known:
        raise ValueError(
            f"{option} must end in a picture's format, one of {', '.join(sorted(known))}, got "
            f"{path}; add .png"
        )


def without_nan(x: Any) -> Any:
    """A value of JSON's types with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, dict):
        return {name: without_nan(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [without_nan(value) for value in x]
    return x


def write_json(path: Path, document: Any) -> None:
    """Write a document of JSON's types; NaN and infinity become null."""
    path.write_text(json.dumps(without_nan(document), indent=1, allow_nan=False) + "\n")
