"""Compile every Triton kernel for sm_<argument>, without a GPU; a line each: name, dtype, bytes of
shared memory, registers and bytes of stack a thread."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from gdn.backends.triton.combine_pieces import carry_kernel
from gdn.backends.triton.decode import decode_kernel
from gdn.backends.triton.key_gradients import key_gradients_kernel
from gdn.backends.triton.launch import Configuration, Stage, configuration
from gdn.backends.triton.prepare import prepare_kernel
from gdn.backends.triton.query_gradients import query_gradients_kernel
from gdn.backends.triton.reverse_scan import reverse_scan_kernel
from gdn.backends.triton.scan import scan_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOM = {80: 166_912, 90: 232_448}
WIDE = {"walked", "own", "initial", "begins", "final", "factors", "g", "beta", "A_log", "dt_bias"}
WIDE |= {"grad_final", "grad_initial", "dG_out", "dG_read", "dg", "dbeta", "dA_log", "ddt_bias"}
WIDE |= {"state"}
INTEGERS = {"N", "T", "NT", "each", "LENGTH", "null_index", "slots", "slot_stride"}
COMMON = {"H": 16, "HV": 32, "K": 128, "V": 128, "C": 64, "BK": 128, "VARLEN": True, "L2": True}
COMMON |= {"GATE": True, "BIAS": True, "SIGMOID": True, "BETA_SCALE": 1.0, "SAVE": True}
WALK = {"V_FIRST": False, "INITIAL": True, "FINAL": True, "OUTPUT": True, "STATES": False}
WALK |= {"TRANSFER": False, "CUT": False, "KEEP": True, "REVERSE": False}
DECODE = {"COLUMNS": 1, "G_STRIDES": (32, 32, 1), "BETA_STRIDES": (32, 32, 1), "T": 1}
DECODE |= {"Q_STRIDES": (8192, 8192, 128), "K_STRIDES": (8192, 8192, 128)}
DECODE |= {"V_STRIDES": (8192, 8192, 128), "accepted": None, "cu_seqlens": None}
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (prepare_kernel, {}),
    (scan_kernel, {}),
    (scan_kernel, {"OUTPUT": False, "STATES": True, "CUT": True, "FINAL": False}),
    (carry_kernel, {}),
    (reverse_scan_kernel, {}),
    (query_gradients_kernel, {}),
    (key_gradients_kernel, {}),
    (decode_kernel, DECODE),
    (decode_kernel, DECODE | {"V_FIRST": True}),
]


def type_of(name: str, dtype: str) -> str:
    """Triton's name for the type of a run-time argument."""
    if name in INTEGERS:
        return "i32"
    if name == "scale":
        return "fp32"
    return "*i32" if name in ("cu_seqlens", "indices") else "*fp32" if name in WIDE else f"*{dtype}"


def compile_for(sm: int, kernel: Any, flags: dict[str, Any], dtype: str) -> str:
    """One line of the output."""
    name, itemsize = kernel.fn.__name__, {"bf16": 2, "fp32": 4}[dtype]
    chosen: Configuration = configuration(name, COMMON["BK"], itemsize, 32, ROOM[sm])
    given = {n: x for n, x in (COMMON | WALK | flags).items() if n in kernel.arg_names}
    stage = Stage(kernel, 1, chosen, **given)
    arguments = [n for n in kernel.arg_names if n not in stage.bound]
    signature = {n: type_of(n, dtype) for n in arguments} | dict.fromkeys(stage.bound, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n].startswith("*") or n == "slot_stride"
    }
    source = ASTSource(kernel, signature, stage.bound, aligned)
    options = {"maxnreg": None} | stage.options
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return f"{name} {dtype} {compiled.metadata.shared} {found[1]} {found[2]}"


if __name__ == "__main__":
    for dtype in ("bf16", "fp32"):
        for kernel, flags in KERNELS:
            print(compile_for(int(sys.argv[1]), kernel, flags, dtype), flush=True)
