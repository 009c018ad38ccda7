"""What other versions left in folders of compiled kernels, and its removal."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from gdn.backends.tilelang import build, prebuilt, upkeep
from prebuilt_entries import JOB, entry_of, find, write

from gdn.cli import main

pytest.importorskip("tilelang")


def age(path: Path) -> None:
    """Let a file be older than what another process may be writing."""
    then = time.time() - upkeep.AT_WORK - 1
    os.utime(path, (then, then))


def write_old(folder: Path) -> set[Path]:
    """An entry of another version, with its library. Returns both."""
    before = set(folder.glob("*"))
    library = prebuilt.write_entry(folder, "prepare", {"K": 64}, [], b"older")
    (entry,) = set(folder.glob("*.json")) - before
    entry.write_text(entry.read_text().replace(prebuilt.versions()["sources"], "0" * 16))
    age(library)
    return {entry, library}


def test_only_what_no_call_can_use_is_left_over(folder: Path) -> None:
    old = write_old(folder)
    write(folder, b"other code")  # replaces the entry, not the library
    replaced = next(x for x in folder.glob("scan-*.so") if x.read_bytes() == b"code")
    assert set(upkeep.leftovers(folder)) == old  # a process may be about to name the library
    age(replaced)
    ours = f".scan-{'0' * 24}.lock", ".gdn-abc_1234.part"
    others = "libcustom.so", "scan-0.so", ".poetry.lock", ".scan.lock", ".download.part"
    for name in (*ours, *others):
        (folder / name).touch()
        age(folder / name)
    (folder / ".gdn-def_1234.part").touch()
    (folder / "notes.json").write_text("{}")
    for path in folder.glob("*.so"):
        age(path)
    dead = {folder / name for name in ours}
    assert set(upkeep.leftovers(folder)) == old | {replaced} | dead


def test_libraries_that_two_versions_share_stay(folder: Path) -> None:
    library = write(folder, b"same")
    prebuilt.write_entry(folder, JOB[0].name, {"K": 128}, [], b"same")
    (other,) = set(folder.glob("*.json")) - {entry_of(folder)}
    other.write_text(other.read_text().replace(prebuilt.versions()["sources"], "0" * 16))
    for path in folder.glob("*.so"):
        age(path)
    upkeep.prune(folder)
    assert not other.exists()
    assert set(folder.glob("*")) == {entry_of(folder), library}
    assert find() is not None


def test_a_build_tells_what_is_old_and_prune_removes_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build-kernels", "--out", str(folder), "--kernel", build.write_job(JOB)]
    assert main(command) == 0
    assert "--prune" not in capsys.readouterr().out
    old = write_old(folder)
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 files of it, 0.0 MB, are of other versions" in said
    assert f"`gdn build-kernels --prune {folder}`" in said
    assert main(["build-kernels", "--prune", str(folder)]) == 0
    assert "2 leftovers of other versions are removed" in capsys.readouterr().out
    assert not any(path.exists() for path in old)
    assert find() is not None
    for options in (["--prune", str(folder), "--out", str(folder)], ["--list", "--prune"], []):
        with pytest.raises(SystemExit):
            main(["build-kernels", *options])


def test_prune_refuses_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / f"scan-{'0' * 24}.so"
    library.touch()
    age(library)
    (tmp_path / "package.json").write_text("{}")
    assert main(["build-kernels", "--prune", str(tmp_path)]) == 2
    assert f"{tmp_path} has no entry of a kernel" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["build-kernels", "--prune", ""])
    assert "--prune: must name a folder" in capsys.readouterr().err
    assert library.exists()


def test_prune_without_a_folder_is_for_the_cache(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-kernels", "--prune"]) == 0  # no cache yet
    cache = prebuilt.cache_folder()
    assert cache is not None
    write(cache)
    other = cache.with_name("0.1.0-0.1.15-0-x86_64")
    shutil.copytree(cache, other)
    working = cache.with_name("0.1.1-0.1.15-0-x86_64")
    working.mkdir()  # another version may have begun to compile there
    age(other)
    old = write_old(cache)
    capsys.readouterr()
    assert main(["build-kernels", "--prune"]) == 0
    assert "3 leftovers of other versions are removed" in capsys.readouterr().out
    assert not other.exists()
    assert working.exists()
    assert not any(path.exists() for path in old)
    assert sorted(x.suffix for x in cache.glob("scan-*")) == [".json", ".so"]
