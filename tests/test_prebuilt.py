"""Folders of compiled kernels: building, looking up, checking, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gdn.backends.tilelang import build, catalogue, launch, prebuilt, toolkit
from gdn.backends.tilelang.kernels import KERNELS
from prebuilt_entries import JOB, entry_of, find, write
from processes import fork

import gdn
from gdn.cli import main

pytest.importorskip("tilelang")
HERE = Path(__file__).parent


def test_names_of_kernels_are_read_back() -> None:
    jobs = catalogue.wanted_jobs(("decode", "prefill"), ("bfloat16",), (64,))
    assert {kernel.name for kernel, _ in jobs} >= {"decode_kernel", "scan", "combine_pieces"}
    for job in jobs:
        assert build.parse_job(build.write_job(job)) == job


@pytest.mark.parametrize("text", ["scan", "scan(K=)", "nothing(K=1)", "scan(K=open('x'))", "1 + 1"])
def test_other_names_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-kernels", "--out", "nowhere", "--kernel", text]) == 2
    assert "a kernel must be like scan(K=128, ...)" in capsys.readouterr().err


def test_folders_are_searched_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, cache = folder.parent / "package" / prebuilt.PACKAGE, prebuilt.cache_folder()
    assert cache is not None
    second = folder.parent / "second"
    monkeypatch.setenv("GDN_KERNELS", os.pathsep.join(map(str, (folder, second))))
    monkeypatch.syspath_prepend(str(package.parent))
    for place in (package / "kernels", second, cache):
        write(place, str(place).encode())
    (package / "__init__.py").touch()
    for what, place in (
        ("gdn-kernels-cu13", package / "kernels"), ("GDN_KERNELS", folder),
        ("GDN_KERNELS", second), ("cache", cache),
    ):  # fmt: skip
        found = find()
        assert found is not None
        assert (found[0], found[1].parent) == (what, place)
        shutil.rmtree(package if what == "gdn-kernels-cu13" else place)
    assert find() is None


def truncate(folder: Path) -> None:
    library = next(folder.glob("*.so"))
    library.write_bytes(library.read_bytes()[:-1])


def remove(folder: Path) -> None:
    next(folder.glob("*.so")).unlink()


def age(folder: Path) -> None:
    text = entry_of(folder).read_text().replace(prebuilt.versions()["sources"], "0" * 16)
    entry_of(folder).write_text(text.replace(gdn.__version__, "0.1.0"))


def cut(folder: Path) -> None:
    entry_of(folder).write_text(entry_of(folder).read_text()[:-20])


def forget_versions(folder: Path) -> None:
    versions = json.dumps(prebuilt.versions(), indent=1).replace("\n", "\n ")
    text = entry_of(folder).read_text()
    assert versions in text
    entry_of(folder).write_text(text.replace(versions, "null"))


def put_folder(folder: Path) -> None:
    entry_of(folder).unlink()
    entry_of(folder).mkdir()


BROKEN = {
    forget_versions: r"is not an entry of kernels: versions must be of type dict, got None",
    put_folder: r"scan-\w+\.json cannot be read: Is a directory",
    truncate: r"scan-\w+\.so \(scan\) is truncated or was changed",
    remove: r"scan-\w+\.so \(scan\) cannot be read: No such file",
    age: rf"\(scan\) was built for gdn 0\.1\.0, not {gdn.__version__}; sources 0{{16}}, not",
    cut: r"scan-\w+\.json is not an entry of kernels",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_bad_entry_is_refused_by_name(
    folder: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find() is not None
    damage(folder)
    with pytest.warns(RuntimeWarning, match=BROKEN[damage]):
        assert find() is None
    assert main(["build-kernels", "--check", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "1 kernels, 1 cannot be used" in out
    assert err.count("\n") == 1
    if damage is put_folder:
        entry_of(folder).rmdir()
    write(folder)  # builders replace it
    assert find() is not None


def test_check_loads_libraries_and_compares_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-kernels", "--check", str(folder)]) == 1  # its library is no library
    assert f"{folder}/scan-" in capsys.readouterr().err
    entry_of(folder).rename(folder / "scan-0.json")
    assert main(["build-kernels", "--check", str(folder)]) == 1
    assert "is of another kernel, scan(K=64" in capsys.readouterr().err
    assert main(["build-kernels", "--check", str(folder / "nothing")]) == 1
    assert "0 kernels" in capsys.readouterr().out


def test_processes_write_and_read_at_once(folder: Path) -> None:
    def write_again_and_again(library: bytes) -> None:
        for n in range(90):
            prebuilt.write_entry(folder, "scan", {"n": n % 3}, [], library)

    prebuilt.versions()
    running = {fork(partial(write_again_and_again, text * 5000)) for text in (b"a", b"b")}
    seen = 0
    while running:
        for n in range(3):
            seen += prebuilt.find("scan", {"n": n}) is not None  # a warning is an error
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            running.remove(process)
            assert status == 0
    assert seen > 0
    assert not list(folder.glob(".*"))
    assert len(list(folder.glob("scan-*.json"))) == 1 + 3


def test_explain_says_where_kernels_come_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--no-raw", "--no-gradients", "--shape", "T=64,K=64,V=64", "--dtype", "bfloat16"]
    assert main(["explain", "--device", "cuda", "--sm", "90", *options]) == 0
    assert "tilelang  yes: can run it (TileLang; kernels: 2 to compile)" in capsys.readouterr().out
    job = next(j for j in catalogue.wanted_jobs(("decode",), ("bfloat16",), (64,)))
    prebuilt.write_entry(folder, job[0].name, job[1], [], b"code")
    assert launch.describe_sources([job, JOB, JOB]) == "kernels: 3 in GDN_KERNELS"


def test_a_kernel_is_built_kept_checked_and_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    shutil.rmtree(folder)
    statics = {
        "dtype": "bfloat16", "K": 64, "V": 64, "gates": "float32", "strengths": "float32",
        "offsets": "int32", "backward": False,
    }  # fmt: skip
    job = (KERNELS["clear_tail"], statics)
    command = ["build-kernels", "--out", str(folder), "--kernel", build.write_job(job)]
    assert main(command) == 0
    library = next(folder.glob("*.so"))
    written = library.stat().st_mtime_ns
    monkeypatch.setattr(toolkit, "find_nvcc", lambda: None)
    assert main(command) == 0  # nothing is left to build
    assert main(["build-kernels", "--check", str(folder)]) == 0
    assert library.stat().st_mtime_ns == written
    (run,) = launch.launchers([job])
    with pytest.raises(RuntimeError, match="num_args should be 7"):
        run()
    capsys.readouterr()
    assert main([*command[:-1], build.write_job(JOB)]) == 1
    assert "1 kernels cannot be compiled here: no nvcc" in capsys.readouterr().err
    entry = prebuilt.read_entry(next(folder.glob("*.json")))
    assert entry is not None
    assert entry.arguments == [f"bfloat16[{n}]" for n in (4, 4, 4)] + [
        "float32[3]", "float32[3]", "int32[1]", "int32[1]",
    ]  # fmt: skip


def test_tilelangs_own_cache_is_apart_for_each_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would give the library of another one, whose CUDA is not the one that an entry says."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "tilelang"))
    monkeypatch.delenv("TILELANG_DISABLE_CACHE", raising=False)
    compile = build.import_compiler()
    options = {"dtype": "bfloat16", "K": 64, "V": 64, "gates": "float32", "strengths": "float32"}
    statics = options | {"offsets": "int32", "backward": False}
    places = []
    for version in (13, 12, 13):
        monkeypatch.setattr(compile, "nvcc_version", lambda path, version=version: version)
        fresh = compile.kernel(KERNELS["clear_tail"].compiled.build)
        places.append(fresh(**statics)._tilelang_cache_path)
    assert places[0] == places[2] != places[1]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the kernels of `prebuilt_calls.py`: of the installed gdn-kernels-cu13, if any."""
    if package := prebuilt.package_folder():
        return package
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    built = tmp_path_factory.mktemp("small")
    calls("list", str(built / "names"))
    kernels_of = ["--kernels-in", str(built / "names")]
    assert main(["build-kernels", "--out", str(built / "kernels"), *kernels_of]) == 0
    return built / "kernels"


def calls(*arguments: str, **environment: str) -> str:
    """The output of `prebuilt_calls.py`, in a process without nvcc and tilelang."""
    command = [sys.executable, str(HERE / "prebuilt_calls.py"), *arguments]
    given = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alone(small_set: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds these kernels and no others."""
    named = "" if small_set == prebuilt.package_folder() else str(small_set)
    return {"GDN_KERNELS": named, "TILELANG_CACHE_DIR": str(tmp_path)}


def test_launches_fit_kernels_in_a_process_without_compiler(
    small_set: Path, tmp_path: Path
) -> None:
    assert main(["build-kernels", "--check", str(small_set)]) == 0
    assert calls("run", "cpu", **alone(small_set, tmp_path)).split()[-1] == str(small_set)


@pytest.mark.gpu
def test_results_of_prebuilt_kernels(small_set: Path, tmp_path: Path) -> None:
    assert "agree with the definition" in calls("run", "cuda", **alone(small_set, tmp_path))
