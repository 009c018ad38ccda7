"""`kernel_list` names the kernels that tests on a GPU need, for `build-kernels --kernels-in`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gdn.backends.tilelang.build import parse_job

HERE = Path(__file__).parent
TEST = "test_strided_inputs.py"


def test_lists_the_kernels_of_forward_and_backward(tmp_path: Path) -> None:
    pytest.importorskip("tilelang", reason="tilelang is not installed")
    pytest.importorskip("triton", reason="triton is not installed")
    listed = tmp_path / "list.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kernel_list", "-p", "no:cacheprovider"]
    command += ["-m", "gpu", "-k", "tilelang", "--kernels", str(listed), str(HERE / TEST)]
    path = os.pathsep.join([str(HERE), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert listed.exists(), done.stdout + done.stderr
    names = {parse_job(line)[0].name for line in listed.read_text().splitlines()}
    assert {"prepare", "scan", "reverse_scan", "gradients"} <= names
