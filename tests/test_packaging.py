"""The house keeps its own rules: the wheel's package list, README's table and commands, sizes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gdn
from gdn import registry

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in a checkout")
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


def test_every_builtin_backend_has_a_package_and_an_extra_if_it_needs_one() -> None:
    folders = {path.parent.name for path in (ROOT / "backends").glob("*/__init__.py")}
    assert folders - {"common"} == set(registry.BUILTIN)
    extras = project()["project"]["optional-dependencies"]
    for info in gdn.list_backends():
        assert not info.capabilities.packages or info.name in extras


def test_version_is_said_once() -> None:
    assert project()["project"]["version"] == gdn.__version__
    assert f"## {gdn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_has_the_generated_table_of_capabilities() -> None:
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gdn", "info", "--markdown"]
    table = subprocess.check_output(command, env=environment, text=True).strip()
    assert table in (ROOT / "README.md").read_text(), "paste the output of: gdn info --markdown"


def test_the_lines_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks[0].splitlines()) == 10
    exec("".join(blocks), {})
    assert "chosen   torch" in capsys.readouterr().out


def test_ci_runs_the_test_command_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (command,) = (line for line in lines if line.endswith("tox -e py311"))
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert text.startswith('"""')
