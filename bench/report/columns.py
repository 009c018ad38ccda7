"""The columns of each kind of row, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gdn.compare import tables

from .rows import Row


def worst(row: Row, outputs: bool) -> float | None:
    """The largest relative error among the outputs, or among the gradients."""
    names = ("o", "final_state", "state")
    errors = row.get("errors", {}).items()
    return tables.worst(x for name, x in errors if (name in names) == outputs)


def _number(field: str, digits: str, scale: float = 1.0) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.get(field)
        return "-" if value is None else format(scale * value, digits)

    return text


def _rate(field: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.get(field)
        return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    return text


def _word(field: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(field, "-"))


def latency(row: Row) -> str:
    """Milliseconds, with a mark unless they are from graph replay."""
    return f"{row['latency_ms']:.3f}{tables.MARKS.get(row['clock'], '')}"


def _error(outputs: bool) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = worst(row, outputs)
        return "-" if value is None else f"{value:.1e}"

    return text


_RATES: dict[str, Callable[[Row], str]] = {
    "ms": latency,
    "wall ms": _number("wall_ms", ".3f"),
    "TFLOPS": _rate("tflops"),
    "GB/s": _rate("gbytes"),
    "roofline": _number("roofline", ".1%"),
    "peak MB": _number("peak_mb", ".0f"),
}
COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "prefill": {
        "H/HV:sequences": _word("shape"),
        "gates": _word("gates"),
        "norm": _word("norm"),
        "decay": _word("decay"),
        "pass": _word("pass"),
        "backend": _word("backend"),
        "path": _word("path"),
        **_RATES,
        "error": _error(True),
        "gradients' error": _error(False),
        "conversions ms": _number("conversions_ms", ".3f"),
        "first s": _number("first_call_s", ".2f"),
    },
    "decode": {
        "H/HV:requests": _word("shape"),
        "decay": _word("decay"),
        "backend": _word("backend"),
        "path": _word("path"),
        **_RATES,
        "error": _error(True),
    },
    "same bits": {
        "H/HV:sequences": _word("shape"),
        "gates": _word("gates"),
        "norm": _word("norm"),
        "pass": _word("pass"),
        "backend": _word("backend"),
        "ms": _number("any_bits_ms", ".3f"),
        "ms, same bits": latency,
        "price": lambda row: f"{row['latency_ms'] / row['any_bits_ms']:.2f}x",
    },
    "layer": {
        "layers": _word("layers"),
        "pass": _word("shape"),
        "engine": _word("backend"),
        "wall ms": _RATES["ms"],
        "peak MB": _RATES["peak MB"],
        "launches": _number("launches", ".0f"),
        "over transformers": _number("speed_up", ".2f"),
    },
    "ranks": {
        "H/HV:sequences": _word("shape"),
        "gates": _word("gates"),
        "pass": _word("pass"),
        "backend": _word("backend"),
        "GPUs": _word("ranks"),
        "ms": latency,
        "eager ms": _number("eager_ms", ".3f"),
        "efficiency": _number("efficiency", ".0%"),
    },
    "pool": {
        "H/HV:sequences": _word("shape"),
        "work": _word("pass"),
        "backend": _word("backend"),
        "ms": latency,
        "ms, what it replaces": _number("beside_ms", ".3f"),
        "ratio": _number("ratio", ".3f"),
    },
    "plain PyTorch": {
        "decay": _word("decay"),
        "T": _word("T"),
        "pass": _word("pass"),
        "implementation": _word("implementation"),
        "ms": _number("latency_ms", ".3f"),
        "peak MB": _number("peak_mb", ".0f"),
    },
    "choosing": {"request from": _word("source"), "us": _number("latency_ms", ".2f", 1e3)},
    "issuing": {
        "pass": _word("pass"),
        "backend": _word("backend"),
        "us": _number("latency_ms", ".1f", 1e3),
    },
    "cold start": {
        "backend": _word("backend"),
        "kernels": _word("kernels"),
        "first forward s": _number("latency_ms", ".2f", 1e-3),
        "training step s": _number("training_ms", ".2f", 1e-3),
        "decode step s": _number("decode_ms", ".2f", 1e-3),
        "import torch s": _number("torch_ms", ".2f", 1e-3),
        "start of CUDA s": _number("cuda_ms", ".2f", 1e-3),
        "import gdn s": _number("gdn_ms", ".2f", 1e-3),
        "whole process s": _number("wall_ms", ".2f", 1e-3),
    },
}
"""By kind of row: headers, and the text under each. * marks plain launches, † a difference."""


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of text for rows of one kind; empty columns are left out."""
    columns = COLUMNS[rows[0]["kind"]]
    lines = [[text(row) for text in columns.values()] for row in rows]
    return without_empty(list(columns), lines)


def without_empty(headers: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that hold nothing."""
    kept = [n for n in range(len(headers)) if any(line[n] != "-" for line in lines)]
    return [headers[n] for n in kept], [[line[n] for n in kept] for line in lines]
