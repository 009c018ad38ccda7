"""TileLang's kernels on a CPU: the CUDA and host code that TileLang generates, compiled for this
machine with the headers in this folder."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
GUARD = 1 << 16
"""Guard bytes on either side of a tensor."""
_CUDA, _INT, _FLOAT, _TENSOR = 2, 1, 3, 7
_DEVICE = 1
"""Not 0, the device of a launch whose first argument is None; others are refused then."""
_CODES = {
    torch.bool: 6,
    torch.int32: 0,
    torch.int64: 0,
    torch.float16: 2,
    torch.float32: 2,
    torch.bfloat16: 4,
}


class _Value(ctypes.Union):
    _fields_ = (("integer", ctypes.c_int64), ("real", ctypes.c_double), ("at", ctypes.c_void_p))


class _Any(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", _Value))


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("number", ctypes.c_int32),
        ("dims", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("offset", ctypes.c_uint64),
    )  # fmt: skip


def _library(kernel: Any, folder: Path, edit: Callable[[str], str]) -> ctypes.CDLL:
    """A kernel's device and host code, compiled."""
    device, host = (
        re.sub(r"^#include.*$", "", source, flags=re.MULTILINE)
        for source in (edit(kernel.get_kernel_source()), kernel.adapter.get_host_source())
    )
    dynamic = r"extern __shared__ __align__\(1024\) (\w+) (\w+)\[\];"
    dynamically = int(re.search(dynamic, device) is not None)
    device = re.sub(dynamic, r"\1 *const \2 = (\1 *)shared_memory;", device)
    name = re.findall(r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(", device)[-1]
    device = f'#include "products.h"\n{device}\n#include "run.h"\n'
    host = f'#include <math.h>\n#include <stdbool.h>\n#include <stdio.h>\n#include "host.h"\n{host}'
    own = "".join(path.read_text() for path in sorted(HERE.glob("*.*")))
    stem = folder / hashlib.sha256((device + host + own).encode()).hexdigest()[:16]
    library = stem.with_suffix(".so")
    if not library.exists():
        common = ["-fPIC", "-w", f"-I{HERE}", f"-DKERNEL={name}", f"-DDYNAMIC={dynamically}"]
        stem.with_suffix(".cpp").write_text(device)
        stem.with_suffix(".c").write_text(host)
        cpp = ["g++", "-std=c++20", "-O1", "-fno-strict-aliasing", "-fno-gnu-unique", *common]
        c = ["gcc", "-O0", *common]
        for command, suffix in ((cpp, ".cpp"), (c, ".c")):
            source = [str(stem.with_suffix(suffix)), "-c", "-o", f"{stem}{suffix}.o"]
            subprocess.run([*command, *source], check=True)
        objects = [f"{stem}.cpp.o", f"{stem}.c.o"]
        subprocess.run(
            ["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(library)], check=True
        )
    found = ctypes.CDLL(str(library))
    found.run.restype = ctypes.c_char_p
    return found


class _Guarded:
    """A copy of a tensor's memory between guard bytes. A kernel must not write them; as floats they
    are NaN."""

    def __init__(self, x: torch.Tensor) -> None:
        last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        self.memory = x.detach().as_strided((last + 1 if x.numel() else 0,), (1,))
        first, size = GUARD + x.data_ptr() % 64, self.memory.nbytes
        self.bytes = torch.full((first + size + GUARD,), 255, dtype=torch.uint8)
        self.guards = self.bytes[:first], self.bytes[first + size :]
        self.inside = self.bytes[first : first + size].view(x.dtype)
        self.inside.copy_(self.memory)

    def take_back(self) -> None:
        """Copy the memory back to the tensor. RuntimeError if a guard byte has changed."""
        if not all((guard == 255).all() for guard in self.guards):
            raise RuntimeError("wrote past a tensor")
        bits = (x.view(torch.uint8) for x in (self.inside, self.memory))
        if not torch.equal(*bits):
            self.memory.copy_(self.inside)


def _tensor(x: torch.Tensor, place: int) -> _Tensor:
    """The DLTensor of a CPU tensor with its memory at `place`, marked as one of a second GPU."""
    sizes = [(ctypes.c_int64 * max(x.dim(), 1))(*given) for given in (x.shape, x.stride())]
    bits = 8 * x.element_size()
    return _Tensor(place, _CUDA, _DEVICE, x.dim(), _CODES[x.dtype], bits, 1, *sizes, 0)


def emulate(
    kernel: Any, folder: Path, late: bool, edit: Callable[[str], str] = str, slow: int = -1
) -> Callable[..., None]:
    """A function that runs a compiled kernel on CPU tensors. folder: for the compiled libraries;
    late, slow: see `block.h`; edit: changes the CUDA source before it is compiled."""
    library = _library(kernel, folder, edit)

    def run(*args: Any) -> None:
        given, held = (_Any * len(args))(), []
        guarded: dict[tuple[int, ...], _Guarded] = {}  # a pool may be several arguments
        for to, x in zip(given, args, strict=True):
            if isinstance(x, torch.Tensor):
                memory = guarded.setdefault((x.data_ptr(), *x.shape, *x.stride()), _Guarded(x))
                held.append(_tensor(x, memory.inside.data_ptr()))
                to.kind, to.value.at = _TENSOR, ctypes.addressof(held[-1])
            elif isinstance(x, float):
                to.kind, to.value.real = _FLOAT, x
            elif x is not None:
                to.kind, to.value.integer = _INT, x
        wrong = library.run(given, len(args), ctypes.c_bool(late), slow)
        if wrong:
            raise RuntimeError(wrong.decode())
        for memory in guarded.values():
            memory.take_back()

    return run
