"""The times of the first calls in a new process: with empty kernel caches, with the caches of that
run, and for TileLang without a compiler, from the kernels of that run as a folder of prebuilt ones.
The quick set uses the caches as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shapes import make_case
from suite import DEVICE, DTYPE, HERE, about, size

import gdn
from gdn.testing import make_inputs

CACHES = ("TRITON_CACHE_DIR", "TILELANG_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUTE_DSL_CACHE_DIR")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def prebuilt(caches: Path) -> dict[str, str]:
    """The environment of a process that finds kernels in a folder, and has no cache."""
    folders = sorted((caches / "tilelang" / "TILELANG_CACHE_DIR" / "gdn").glob("*"))
    if not folders:
        pytest.skip("no kernels were compiled before")
    empty = str(caches / "none")
    return {"GDN_KERNELS": os.pathsep.join(map(str, folders)), "TILELANG_CACHE_DIR": empty}


@pytest.mark.parametrize("kernels", ["empty cache", "warm cache", "prebuilt"])
def test_cold_start(
    request: pytest.FixtureRequest, benchmark: Any, caches: Path, backend: str, kernels: str
) -> None:
    inputs = make_inputs(make_case("16/32:1x64", "model", DTYPE), DEVICE)
    (verdict,) = (v for v in gdn.explain(**inputs).verdicts if v.name == backend)
    if verdict.reasons:
        pytest.skip("; ".join(verdict.reasons))
    if kernels == "prebuilt" and backend != "tilelang":
        pytest.skip("only tilelang's kernels can be prebuilt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    if size(request.config) != "quick":
        environment |= {name: str(caches / backend / name) for name in CACHES}
        environment.pop("GDN_KERNELS", None)
    elif kernels != "warm cache":
        pytest.skip("not in the quick set")
    command = [sys.executable, str(HERE / "first_call.py"), backend, DEVICE.type]
    if kernels == "prebuilt":
        environment |= prebuilt(caches)
        command.append("--no-compiler")
    elif kernels == "empty cache" and backend == "tilelang":
        command.append("--warm-up")  # the prebuilt row needs more than the calls themselves
    seconds: dict[str, float] = {}

    def start() -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seconds.update(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(start, rounds=1)
    benchmark.extra_info |= {
        "kind": "cold start",
        "backend": backend,
        "kernels": "cache as found" if size(request.config) == "quick" else kernels,
        "latency_ms": 1e3 * seconds.pop("forward"),
        **{f"{name}_ms": 1e3 * x for name, x in seconds.items()},
        "environment": about(),
    }
