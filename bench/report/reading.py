"""Reading the files that `pytest bench --benchmark-json` wrote. The fields that tables and figures
rely on are checked here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import NoneType
from typing import Any

from gdn.compare.roofline import PASSES
from gdn.testing import TOLERANCE

from .rows import IDENTITY, Results, Row, require_once, rows_of

NUMBER = int, float
PERHAPS = int, float, NoneType
"""A number, or null where it was NaN."""
TYPES: dict[str, Any] = dict.fromkeys(IDENTITY, str) | {
    "clock": str, "tokens": int, "batch": int, "latency_ms": NUMBER,
    "tflops": PERHAPS, "gbytes": PERHAPS, "roofline": PERHAPS, "peak_mb": PERHAPS,
    "conversions_ms": PERHAPS, "first_call_s": PERHAPS, "errors": dict, "clocks": dict,
    "any_bits_ms": NUMBER, "layers": int, "speed_up": NUMBER, "launches": PERHAPS,
    "beside_ms": PERHAPS, "ratio": PERHAPS, "eager_ms": NUMBER,
    "case": {"B": int, "lengths": (list, NoneType), "dtype": str},
    "ceilings": {"flops": NUMBER, "bytes": NUMBER},
    "environment": {
        "device": str, "cuda": (str, NoneType), "python": str, "versions": dict,
        "commit": (str, NoneType), "command": str, "time": str,
    },
}  # fmt: skip
"""Fields of rows and their types. A dictionary holds the types of the fields within."""
TIMED = (
    "shape", "gates", "pass", "backend", "clock", "tokens", "errors", "case", "ceilings",
    "environment",
)  # fmt: skip
NEEDED: dict[str, tuple[str, ...]] = {
    "prefill": TIMED,
    "decode": (*TIMED, "batch"),
    "same bits": (*TIMED, "any_bits_ms"),
    "layer": ("shape", "backend", "clock", "layers", "speed_up", "environment"),
    "ranks": ("shape", "gates", "pass", "backend", "ranks", "environment"),
    "pool": TIMED,
    "plain PyTorch": (),
    "choosing": (),
    "issuing": ("backend",),
    "cold start": ("backend", "kernels"),
}
"""The fields that a row of each kind must have, beside latency_ms."""
NAMES: dict[type, str] = {
    str: "text", int: "a number", float: "a number", list: "a list", dict: "an object",
    NoneType: "null",
}  # fmt: skip


def load(path: Path) -> Results:
    """Read a file, or all those of a folder together. ValueError if one is malformed, or if they
    hold no rows of this suite or one twice."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    runs = [_read(file) for file in files]
    rows = [row for run in runs for row in run.rows]
    if not rows:
        raise ValueError(f"{path} holds no rows; write it by pytest bench --benchmark-json={path}")
    require_once(rows, str(path))
    return Results(rows, [row for run in runs for row in run.not_timed])


def _read(file: Path) -> Results:
    """The rows of one file, none if it holds no benchmarks."""
    try:
        text = file.read_text()
        if not text.strip():
            raise ValueError("it is empty")
        document = json.loads(text)
        _check(document)
    except (
        ValueError,
        RecursionError,
        OverflowError,
    ) as error:  # of the text, of the JSON, or of the rows
        raise ValueError(
            f"{file} must hold what pytest bench --benchmark-json writes, but {error}; "
            "write it again, or leave it out"
        ) from error
    return Results(rows_of(document), document.get("not_timed", []))


def _check(document: Any) -> None:
    """ValueError unless a document's rows hold what tables and figures rely on."""
    _require(document, {}, "the document")
    for name in ("benchmarks", "not_timed"):
        _require(document.get(name, []), list, name)
    for n, row in enumerate(document.get("benchmarks", [])):
        where = f"benchmarks[{n}]"
        _require(row, {"extra_info": {}, "stats": {"median": NUMBER}}, where)
        if "kind" in row["extra_info"]:  # else it is not of this suite
            _check_row(row["extra_info"], f"{where}.extra_info")
    for n, row in enumerate(document.get("not_timed", [])):
        _require(row, dict.fromkeys(("backend", "pass", "shape", "gates"), str), f"not_timed[{n}]")
        why = "failed" if "failed" in row else "refused"
        _require(row, {why: str}, f"not_timed[{n}]")


def _check_row(row: Row, where: str) -> None:
    """ValueError unless a row holds the fields of its kind, and values that can be drawn."""
    _require(row, {"kind": str}, where)
    _require_of(row, "kind", list(NEEDED), where)
    present = [name for name in TYPES if name in row]
    _require(row, {x: TYPES[x] for x in (*NEEDED[row["kind"]], "latency_ms", *present)}, where)
    numbers = {"latency_ms": row["latency_ms"]} | row.get("ceilings", {})
    for name, number in numbers.items():
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{where}.{name} must be above 0 and finite, got {number}")
    _require(row.get("errors", {}), dict.fromkeys(row.get("errors", {}), PERHAPS), where)
    _require(row.get("clocks", {}), dict.fromkeys(row.get("clocks", {}), str), where)
    if row["kind"] in ("prefill", "decode"):
        _require_of(row, "pass", [*PASSES, "decode"], where)
        dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
        _require_of(row["case"], "dtype", dtypes, f"{where}.case")
        if not re.match(r"\d+/\d+(/\d+)?:", row["shape"]):
            raise ValueError(f"{where}.shape must be like 16/32:1x8192, got {row['shape']!r}")


def _require(value: Any, form: Any, where: str) -> None:
    """ValueError unless a value is of a type, of one of several types, or is an object whose fields
    are of the types that a dictionary gives."""
    types = (dict,) if isinstance(form, dict) else form if isinstance(form, tuple) else (form,)
    if not isinstance(value, types):
        names = " or ".join(dict.fromkeys(NAMES[x] for x in types))
        raise ValueError(f"{where} must be {names}, got {json.dumps(value)[:60]}")
    for name, inner in form.items() if isinstance(form, dict) else ():
        if name not in value:
            raise ValueError(f"{where} must hold {name}, got none")
        _require(value[name], inner, f"{where}.{name}")


def _require_of(row: Row, name: str, known: list[str], where: str) -> None:
    if row[name] not in known:
        raise ValueError(f"{where}.{name} must be one of {', '.join(known)}, got {row[name]!r}")
