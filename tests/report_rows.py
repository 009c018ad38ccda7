"""A small file of results, as `pytest bench --benchmark-json` writes it."""

from __future__ import annotations

from typing import Any

ABOUT = {
    "ceilings": {"flops": 8e14, "bytes": 4e12},
    "clocks": {"clocks.sm": "1980 MHz"},
    "environment": {
        "device": "a <GPU>",
        "cuda": "13.0",
        "python": "3.12",
        "versions": {"torch": "2.11"},
        "commit": "c0ffee",
        "command": "pytest bench",
        "time": "then",
    },
}


def prefill(backend: str, which: str, T: int, ms: float, clock: str = "graph") -> dict[str, Any]:
    case = {"B": 1, "lengths": None, "dtype": "bfloat16"}
    row = {"shape": f"2/4:1x{T}", "gates": "model", "pass": which, "backend": backend}
    rates = {"tflops": 100 / ms, "gbytes": 50 / ms, "roofline": 0.1 / ms, "peak_mb": 3.0}
    errors = {"o": 1e-3, "q": 2e-3}
    more = {"kind": "prefill", "tokens": T, "path": "p", "latency_ms": ms, "clock": clock}
    return row | rates | more | ABOUT | {"case": case, "errors": errors}


def decode(backend: str, batch: int, ms: float) -> dict[str, Any]:
    more = {"kind": "decode", "shape": f"2/4:{batch}x1", "pass": "decode", "batch": batch}
    return prefill(backend, "decode", batch, ms) | more


def make_document() -> dict[str, Any]:
    """fla is twice as fast as torch. mine is three times as fast as fla at 64 tokens, and half as
    fast at 128."""
    rows = []
    for which in ("fwd", "bwd"):
        for T in (64, 128):
            mine = T / 128 / 3 if T == 64 else 2 * T / 128
            rows.append(prefill("mine", which, T, mine))
            rows.append(prefill("fla", which, T, T / 128, "difference"))
            rows.append(prefill("torch", which, T, 2 * T / 128, "events"))
    rows += [decode(name, n, 0.1 * n) for name in ("mine", "fla") for n in (1, 8)]
    rows.append({"kind": "cold start", "backend": "mine", "kernels": "empty cache"})
    rows[-1] |= {"latency_ms": 1e4}
    refused = {"shape": "2/4:1x64", "gates": "model", "pass": "bwd", "backend": "other"}
    return {
        "benchmarks": [{"extra_info": row, "stats": {"median": 0.5}} for row in rows],
        "not_timed": [refused | {"refused": "no <luck>"}, refused | {"failed": "off by 1"}],
    }
