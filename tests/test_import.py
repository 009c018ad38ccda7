"""Importing gdn imports no optional package and touches no device; tested in new processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

OPTIONAL = ("triton", "tilelang", "fla", "einops", "flash_qla", "matplotlib", "transformers")

BLOCK = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # any import of it is an ImportError
"""
NO_DEVICE = """
import torch
def touched(*args, **kwargs):
    raise AssertionError("a device was touched")
for name in ("_lazy_init", "is_available", "device_count", "get_device_capability"):
    setattr(torch.cuda, name, touched)
"""
USE = """
from gdn.testing import Case, make_inputs
inputs = make_inputs(Case("use", T=3))
inputs["v"].requires_grad_()
gdn.gated_delta_net(**inputs).o.sum().backward()
rows = {row.name: row.reason for row in gdn.list_backends()}
assert rows["torch"] is None, rows
"""


def python(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("device", ["", NO_DEVICE], ids=["", "no-device"])
def test_imports_and_runs_without_the_optional_packages(device: str) -> None:
    use = USE + 'assert "not installed: fla" in rows["fla"], rows\n'
    python(BLOCK + device + "import gdn\n" + use)


def test_imports_nothing_optional_and_touches_no_device() -> None:
    loaded = "import sys\nprint(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    with_torch = set(python("import torch, numpy\n" + loaded).split())
    with_gdn = set(python(NO_DEVICE + "import numpy, gdn\n" + USE + loaded).split())
    assert not with_gdn & set(OPTIONAL) - with_torch


def test_submodules_that_the_readme_names_need_no_import_of_their_own() -> None:
    python("import gdn\ngdn.nn.GatedDeltaNet, gdn.definition.gated_delta_rule\n")


def test_a_call_for_a_backend_that_is_not_installed_says_so() -> None:
    python(
        BLOCK + "import gdn\nfrom gdn.testing import Case, make_inputs\n"
        "try:\n    gdn.gated_delta_net(**make_inputs(Case('x', T=3)), backend='fla')\n"
        "except gdn.BackendUnsupportedError as error:\n"
        "    assert 'not installed: fla, triton, einops' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
