"""What a measurement depends on: device, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gdn


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    """The commit that gdn runs from, with "-dirty" if files have changed; None outside a checkout.
    GDN_COMMIT overrides it, for a copy of a checkout without .git."""
    if given := os.environ.get("GDN_COMMIT"):
        return given
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    return _output_of("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", about.read_text()) if about.exists() else []
    processor = models[0] if models else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads"


def gpu_state(device: torch.device, *fields: str) -> dict[str, str]:
    """Fields of nvidia-smi, such as clocks.sm, as text; empty on a CPU or if nvidia-smi fails."""
    if device.type != "cuda":
        return {}
    index = str(device.index or 0)
    query = f"--query-gpu={','.join(fields)}"
    line = _output_of("nvidia-smi", "-i", index, query, "--format=csv,noheader")
    return dict(zip(fields, line.split(", "), strict=False)) if line else {}


def _command() -> str:
    """The command line as a shell takes it, with absolute paths reduced to their last part."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *(re.sub(r"(?<!\w)/\S*/", "", word) for word in sys.argv[1:])])


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit, command and time, for a file of results."""
    packages = (
        "torch", "triton", "tilelang", "fla-core", "flash-qla", "flashinfer-python",
        "transformers",
    )  # fmt: skip
    return {
        "device": device_name(device),
        **gpu_state(device, "driver_version"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {"gdn": gdn.__version__}
        | {name: version for name in packages if (version := _version(name))},
        "commit": commit(),
        "command": _command(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
