"""Processes that need the same kernel at once: one of them builds it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tilelang")
from gdn.backends.tilelang import build, prebuilt, turn, upkeep
from gdn.backends.tilelang.kernels import KERNELS, Job
from processes import fork

JOB: Job = (KERNELS["scan"], {"K": 64, "dtype": "bfloat16", "pool": None})
KEY = prebuilt.key(JOB[0].name, JOB[1])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_build_a_kernel_once(tmp_path: Path) -> None:
    def build_slowly() -> None:
        with build.turn_to_build(JOB, tmp_path) as missing:
            if missing:
                (tmp_path / f"built by {os.getpid()}").touch()
                time.sleep(0.3)
                prebuilt.write_entry(tmp_path, JOB[0].name, JOB[1], [], b"code")

    prebuilt.versions()
    for process in [fork(build_slowly) for _ in range(3)]:
        assert os.waitpid(process, 0)[1] == 0
    assert build.is_built(JOB, tmp_path)
    assert len(list(tmp_path.glob("built by *"))) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_process_that_dies_gives_its_turn_away(tmp_path: Path) -> None:
    def hold() -> None:
        with turn.take_turn(tmp_path, KEY):
            (tmp_path / "held").touch()
            time.sleep(60)

    process = fork(hold)
    wait_until((tmp_path / "held").exists)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert (tmp_path / f".{KEY}.lock").exists()
    begin = time.monotonic()
    with turn.take_turn(tmp_path, KEY):
        assert time.monotonic() - begin < 30


def test_a_lock_that_is_taken_again_does_not_look_old(tmp_path: Path) -> None:
    path = tmp_path / f".{KEY}.lock"
    path.touch()
    os.utime(path, (0, 0))
    with turn.take_turn(tmp_path, KEY):
        assert path.stat().st_mtime > time.time() - 60
        assert upkeep.leftovers(tmp_path) == []


def test_turns_exclude_each_other_many_times(tmp_path: Path) -> None:
    """Each turn removes the file that the others wait for."""

    def count() -> None:
        for _ in range(50):
            with turn.take_turn(tmp_path, KEY):
                now = int((tmp_path / "count").read_text())
                time.sleep(0.0005)
                (tmp_path / "count").write_text(str(now + 1))

    (tmp_path / "count").write_text("0")
    turn.PAUSE, pause = 0.0002, turn.PAUSE
    try:
        processes = [fork(count) for _ in range(3)]
    finally:
        turn.PAUSE = pause
    for process in processes:
        assert os.waitpid(process, 0)[1] == 0
    assert (tmp_path / "count").read_text() == "150"


def test_without_a_lock_a_kernel_is_built_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build.turn_to_build(JOB, tmp_path / "nothing") as missing:  # no file can be made there
        assert missing
    monkeypatch.setattr(turn, "PATIENCE", 0.2)
    with turn.take_turn(tmp_path, KEY), build.turn_to_build(JOB, tmp_path) as missing:
        assert missing  # it waited long enough
    with build.turn_to_build((JOB[0], JOB[1] | {"K": 128}), tmp_path) as missing:
        assert missing  # other kernels have turns of their own


LAUNCH = """
import sys
from gdn.backends.tilelang import build, launch
launch.launchers([build.parse_job(sys.argv[1])])
print("compiled" if "tilelang" in sys.modules else "waited")
"""


def test_two_ranks_compile_a_kernel_once(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    statics = {
        "dtype": "bfloat16", "K": 64, "V": 64, "gates": "float32", "strengths": "float32",
        "offsets": "int32", "backward": False,
    }  # fmt: skip
    name = build.write_job((KERNELS["clear_tail"], statics))
    paths = os.pathsep.join(sys.path)
    environment = os.environ | {"TILELANG_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    environment.pop("GDN_KERNELS", None)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, name], env=environment, text=True, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    assert sorted(rank.communicate()[0].split()[-1] for rank in ranks) == ["compiled", "waited"]
