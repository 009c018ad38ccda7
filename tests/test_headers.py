"""Shorter headers for nvcc: the same code, and all headers where the shorter ones do not do."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tilelang")
from gdn.backends.tilelang import compile, headers
from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

SOURCE = """
#include <tl_templates/cuda/instruction/wgmma.h>
extern "C" __global__ void product(uint64_t a, uint64_t b, uint32_t *c) {
  tl::wgmma_ss<tl::DataType::kBFloat16, tl::DataType::kBFloat16, tl::DataType::kFloat32, 64, SIZE, \
16, false, false, 1, 1>(a, b, c, true);
}
""".replace("\\\n", "")
OPTIONS = ["-std=c++20", f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}"]


def build(source: str) -> bytes:
    return bytes(compile._compile_cuda(source, arch=["-arch=sm_90a"], options=OPTIONS))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The options of each compile: which shorter headers it had."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    found: list[list[str]] = []
    run = compile.subprocess.run

    def record(command: list[str], **options: Any) -> Any:
        found.append([x for x in command if re.match("-I.*headers", x)])
        return run(command, **options)

    monkeypatch.setattr(compile.subprocess, "run", record)
    return found


def test_the_code_is_the_same(tried: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCE.replace("SIZE", "128")
    short = build(source)
    assert len(tried) == 1
    assert tried[0]
    monkeypatch.setattr(compile, "write_short_headers", lambda source, folder: [])
    assert build(source) == short
    assert not tried[1]


def test_other_sizes_have_all_headers(tried: list[list[str]]) -> None:
    assert build(SOURCE.replace("SIZE", "24"))
    assert tried == [[]]


def test_headers_that_do_not_compile_are_left_out(
    tried: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = headers._full_text().replace("struct CallWgmmaSS", "struct Other")
    monkeypatch.setattr(headers, "_full_text", lambda: broken)
    assert build(SOURCE.replace("SIZE", "64"))
    assert [bool(x) for x in tried] == [True, False]
    with pytest.raises(RuntimeError, match="SIZE"):
        build(SOURCE)  # the error is nvcc's with all headers
    assert not tried[-1]


def test_headers_of_another_version_are_not_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCE.replace("SIZE", "64")
    assert headers.write_short_headers(source, tmp_path / "one")
    monkeypatch.setattr(headers, "_full_text", lambda: "// no such lists")
    assert headers.write_short_headers(source, tmp_path / "two") == []
    assert headers.write_short_headers("// no product", tmp_path / "three") == []


def test_without_the_header_there_is_none_to_shorten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "TILELANG_TEMPLATE_PATH", str(tmp_path / "nothing"))
    headers._full_text.cache_clear()
    assert headers.write_short_headers(SOURCE.replace("SIZE", "64"), tmp_path / "one") == []
    headers._full_text.cache_clear()
