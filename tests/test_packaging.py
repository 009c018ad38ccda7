"""The rules of the repository: packages of the wheel, contents of documents, sizes of files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import gdn
from gdn import registry
from gdn.testing import Case, make_inputs

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="not in a checkout")
DOCUMENTS = sorted(
    [
        *(path for top in ("", "examples/", "tests/*/") for path in ROOT.glob(f"{top}*.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
SOURCES = sorted(
    path
    for top in ("gdn", "backends", "tests", "bench", "examples")
    for path in (ROOT / top).rglob("*.py")
)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_in_the_wheel() -> None:
    found = set()
    for top, name in (("gdn", "gdn"), ("backends", "gdn.backends")):
        for path in (ROOT / top).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / top).parts
            found.add(".".join((name, *inner)))
    assert set(project()["tool"]["setuptools"]["packages"]) == found


def test_the_sdist_is_the_repository(tmp_path: Path) -> None:
    """So its tests run from it."""
    pytest.importorskip("setuptools")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a clone")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "tree" / name)
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    command = [sys.executable, "-c", build]
    subprocess.run(command, cwd=tmp_path / "tree", check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    assert set(names) <= packed


def test_every_builtin_backend_has_a_package_and_an_extra_if_it_needs_one() -> None:
    folders = {path.parent.name for path in (ROOT / "backends").glob("*/__init__.py")}
    assert folders - {"common"} == set(registry.BUILTIN)
    extras = project()["project"]["optional-dependencies"]
    for info in gdn.list_backends():
        assert not info.capabilities.packages or info.name in extras


def test_version_is_said_once() -> None:
    assert project()["project"]["version"] == gdn.__version__
    kernels = tomllib.loads((ROOT / "packages/gdn-kernels-cu13/pyproject.toml").read_text())
    assert kernels["project"]["version"] == gdn.__version__
    assert f"gdn=={gdn.__version__}" in kernels["project"]["dependencies"]
    hopper = project()["project"]["optional-dependencies"]["hopper"]
    assert any(x.startswith(f"gdn-kernels-cu13=={gdn.__version__};") for x in hopper)
    assert f"## {gdn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_table_of_capabilities_is_the_generated_one() -> None:
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gdn", "info", "--markdown"]
    table = subprocess.check_output(command, env=environment, text=True).strip()
    text = (ROOT / "docs" / "backends.md").read_text()
    assert table in text, "paste the output of: gdn info --markdown"


def test_the_lines_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks[0].splitlines()) == 10
    exec("".join(blocks), {})
    assert "chosen   torch" in capsys.readouterr().out


def test_the_backend_of_the_documents_runs() -> None:
    """The class in docs/backends.md agrees with the torch backend."""
    text = (ROOT / "docs" / "backends.md").read_text()
    blocks = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    (block,) = (block for block in blocks if "class MyBackend" in block)
    found: dict[str, Any] = {}
    exec(block, found)
    inputs = make_inputs(Case("shown", T=70, HV=4))
    gdn.register_backend(found["MyBackend"]())
    try:
        got = gdn.gated_delta_net(**inputs, backend="mine")
        with pytest.raises(gdn.BackendUnsupportedError, match="cu_seqlens is not supported"):
            gdn.gated_delta_net(**make_inputs(Case("packed", lengths=(3, 4))), backend="mine")
    finally:
        gdn.unregister_backend("mine")
    expected = gdn.gated_delta_net(**inputs, backend="torch")
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_documents_resolve(path: Path) -> None:
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link} does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", x).strip().lower().replace(" ", "-") for x in titles]
            assert anchor in slugs, f"{link} has no such heading"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_ci_runs_the_test_command_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (command,) = (line for line in lines if line.endswith("tox -e py311"))
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_have_a_docstring(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert text.startswith('"""')


BARE = f"""
import sys
for name in ("rich", "matplotlib", "triton", "tilelang", "fla", "einops", "transformers"):
    sys.modules[name] = None  # any import of it is an ImportError
sys.path.insert(0, {str(ROOT)!r})
"""


@pytest.mark.parametrize(
    "code",
    [
        "import torch, gdn; x = torch.rand(1, 3, 2, 4); g = -torch.rand(1, 3, 2); "
        "print(gdn.gated_delta_net(x, x, x, g, -g).o.shape, gdn.__file__)",
        "from gdn.cli import main; import gdn; main(['info']); print(gdn.__file__)",
    ],
    ids=["op", "info"],
)
def test_the_root_of_a_clone_runs_with_torch_alone(code: str) -> None:
    """Whatever is installed: there, Python finds ./gdn first."""
    out = subprocess.check_output([sys.executable, "-c", BARE + code], cwd=ROOT, text=True)
    assert str(ROOT / "gdn") in out
