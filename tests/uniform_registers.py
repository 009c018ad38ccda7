"""Uniform registers of SASS that instructions read before any instruction writes them.

ptxas 12.8.93, which Triton 3.6 brings, computed addresses of WGMMA's operands from such a register:
gradients in float16 with a decay per channel were off by 1e30. ptxas 12.9 and 13.0 compile the same
PTX right.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;")
WRITES = re.compile(r"(?:U(?!STP|BRA)|R2UR|S2UR|VOTEU|REDUX|ELECT)")
"""Instructions whose first operands are results."""


def run_tool(name: str, *arguments: str | Path) -> str:
    """What a tool of CUDA that Triton brings prints: `nvdisasm -c CUBIN` prints SASS."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def unset_registers(sass: str) -> list[str]:
    """Instructions that read a uniform register that no instruction before them in the text writes.
    Such a register may hold anything. Not found are registers that hold an older value, or were
    written under a predicate, and the second register of some pairs."""
    written: set[int] = set()
    found = []
    for line in sass.splitlines():
        if instruction := INSTRUCTION.search(line):
            name, operands = instruction[1], instruction[2].split(", ")
            results = _count_results(name, operands) if WRITES.match(name) else 0
            if not _numbers(name, operands[results:]) <= written:
                found.append(instruction[0])
            written |= _widen(name, operands[:results])
    return found


def _count_results(name: str, operands: list[str]) -> int:
    """Predicates, and one register unless the instruction compares: two of
    `UIADD3 UR6, UP0, UR7, 0x40, URZ`."""
    most = 0 if "SETP" in name else 1
    registers = count = 0
    for operand in operands:
        registers += operand.startswith("UR")
        if not re.fullmatch(r"UR\d+|URZ|U?P\d|U?PT", operand) or registers > most:
            break
        count += 1
    return count


def _widen(name: str, results: list[str]) -> set[int]:
    """The registers that hold results."""
    size = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    numbers = [int(x[2:]) for x in results if re.fullmatch(r"UR\d+", x)]
    return {n + i for n in numbers for i in range(size)}


def _is_wide(name: str, source: str, sources: list[str]) -> bool:
    """Whether a uniform instruction reads a pair of registers."""
    wide = ".64" in name or (".WIDE" in name and source == sources[-1])  # the summand of a product
    return name.startswith("U") and wide and "c[" not in source


def _numbers(name: str, sources: list[str]) -> set[int]:
    """The registers that are read."""
    found = set()
    for source in sources:
        for text in re.findall(r"\bUR(\d+)\b", source):
            first, last = int(text), int(text)
            if re.match("[A-Z]GMMA", name) and "gdesc" in source:  # addresses of A and of B
                first, last = first + (2 if re.match(r"R\d", sources[1]) else 0), first + 3
            elif f"desc[UR{text}]" in source or _is_wide(name, source, sources):
                last = first + 1
            found |= set(range(first, last + 1))
    return found
