"""Compiled kernels in folders. They load without a compiler, and without importing tilelang.

A folder has an entry for every kernel: `KEY.json`, named after the kernel and its options, and the
shared library that it names. A library's own name has its checksum in it, so it never changes, and
`KEY.json` is replaced at once: any number of processes may read and build at the same time.

`folders` lists the places in their order. Of TileLang only libraries are needed: its runtime.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gdn
from gdn import definition, problem

from . import toolkit

PACKAGE = "gdn_kernels_cu13"
VARIABLE = "GDN_KERNELS"
_RUNTIME = ("libstub_cuda.so", "libstub_cudart.so", "libtvm_runtime.so", "libtilelang.so")
"""In the order in which they are loaded. The last makes descriptors for TMA when kernels are
launched."""
_APART = ("__init__.py", "build.py", "catalogue.py", "kernels.py", "launch.py", "prebuilt.py",
          "toolkit.py", "turn.py", "upkeep.py")  # fmt: skip
"""Files of this backend that find and build kernels, and do not change them."""


class KernelFileError(RuntimeError):
    """An entry that must not be used; the message has its name."""


class Entry(NamedTuple):
    """What `KEY.json` says. arguments: dtype and, of tensors, number of dimensions, of what is
    launched; file, sha256: the library; versions: see `versions`; cuda: of the nvcc that built it,
    its major version, or 0."""

    kernel: str
    options: str
    arguments: list[str]
    file: str
    sha256: str
    versions: dict[str, str]
    cuda: int = 0

    @property
    def name(self) -> str:
        """The kernel with its options, as `gdn build-kernels --kernel` takes it."""
        return f"{self.kernel}({self.options})"


def write_options(statics: dict[str, Any]) -> str:
    """Static options as Python writes arguments, in alphabetical order."""
    text = ", ".join(f"{name}={statics[name]!r}" for name in sorted(statics))
    return text.replace("'", '"')  # so that a shell takes it between single quotes


def full_name(kernel: str, statics: dict[str, Any]) -> str:
    """A kernel with its options."""
    return f"{kernel}({write_options(statics)})"


def key_of(name: str) -> str:
    """The name of an entry, for a kernel's full name."""
    return f"{name.partition('(')[0]}-{hashlib.sha256(name.encode()).hexdigest()[:24]}"


def key(kernel: str, statics: dict[str, Any]) -> str:
    """The name of a kernel's entry."""
    return key_of(full_name(kernel, statics))


@functools.cache
def versions() -> dict[str, str]:
    """What kernels belong to: the versions of gdn and TileLang, a checksum of the sources of
    kernels and plans, which tells two checkouts of one version apart, and the kind of processor."""
    here = Path(__file__).parent
    sources = hashlib.sha256()
    for module in (definition, problem):  # kernels take constants from these
        sources.update(Path(str(module.__file__)).read_bytes())
    for path in sorted(here.rglob("*.py")):
        name = str(path.relative_to(here))
        if name not in _APART:
            sources.update(name.encode() + b"\0" + path.read_bytes())
    return {
        "gdn": gdn.__version__,
        "tilelang": importlib.metadata.version("tilelang"),
        "sources": sources.hexdigest()[:16],
        "machine": platform.machine(),
    }


# === folders ===


def package_folder() -> Path | None:
    """The folder of the distribution gdn-kernels-cu13, if it is installed."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) / "kernels" if places else None


def cache_folder() -> Path | None:
    """Where kernels go that were compiled for a call: in TileLang's cache, apart for each version.
    None if that cache is switched off."""
    if os.environ.get("TILELANG_DISABLE_CACHE", "0").lower() in ("1", "true", "yes", "on"):
        return None
    root = os.environ.get("TILELANG_CACHE_DIR") or Path.home() / ".tilelang" / "cache"
    return Path(root) / "gdn" / "-".join(versions().values())


def folders() -> Iterator[tuple[str, Path]]:
    """The folders that are there, in the order in which kernels are looked up, each with what it
    is: the package, those of GDN_KERNELS, the cache."""
    given = os.environ.get(VARIABLE, "").split(os.pathsep)
    places = [(PACKAGE.replace("_", "-"), package_folder())]
    places += [(VARIABLE, Path(x)) for x in given if x]
    places += [("cache", cache_folder())]
    for what, place in places:
        if place is not None and place.is_dir():
            yield what, place


# === entries ===

unloadable: dict[Path, str] = {}
"""Libraries that this machine could not load, such as those of a newer system, and why."""


def refuse(library: Path, error: Exception) -> None:
    """Use a library no more in this process, and warn of it."""
    _warn_once(unloadable.setdefault(library, f"{library} cannot be loaded: {error}"))


def _require_driver(entry: Entry, path: Path) -> None:
    now = toolkit.driver()
    if now is not None and now < entry.cuda:
        raise KernelFileError(
            f"{path} ({entry.kernel}) was built by nvcc of CUDA {entry.cuda}, and the driver is of "
            f"CUDA {now}: update the driver, or build the kernel by nvcc of CUDA {now}"
        )


def parse_entry(text: bytes) -> Entry:
    """The entry in a text. ValueError or TypeError if it is none."""
    entry = Entry(**json.loads(text))
    for name, value in entry._asdict().items():
        kind = {"arguments": list, "versions": dict, "cuda": int}.get(name, str)
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return entry


def read_entry(path: Path) -> Entry | None:
    """The entry in `KEY.json`, or None if there is no such file. KernelFileError if it is of
    another version or cannot be read, or its library is missing or is not what was built."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KernelFileError(f"{path} cannot be read: {error.strerror}") from None
    try:
        entry = parse_entry(text)
        file = path.parent / Path(entry.file).name
    except (ValueError, TypeError) as error:
        raise KernelFileError(f"{path} is not an entry of kernels: {error}") from None
    other = [f"{x} {entry.versions.get(x)}, not {now}" for x, now in versions().items()
             if entry.versions.get(x) != now]  # fmt: skip
    if other:
        raise KernelFileError(f"{path} ({entry.kernel}) was built for {'; '.join(other)}")
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise KernelFileError(f"{file} ({entry.kernel}) cannot be read: {error.strerror}") from None
    if found != entry.sha256:
        raise KernelFileError(f"{file} ({entry.kernel}) is truncated or was changed")
    return entry


def write_entry(
    folder: Path, kernel: str, statics: dict[str, Any], arguments: list[str], library: bytes,
    cuda: int = 0,
) -> Path:  # fmt: skip
    """Add a kernel to a folder, or replace it. Returns the path of its library."""
    folder.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.sha256(library).hexdigest()
    file = folder / f"{kernel}-{checksum[:24]}.so"
    options = write_options(statics)
    entry = Entry(kernel, options, arguments, file.name, checksum, versions(), cuda)
    _replace(file, library)
    unloadable.pop(file, None)
    text = json.dumps(entry._asdict(), indent=1)
    _replace(folder / f"{key(kernel, statics)}.json", text.encode())
    return file


def _replace(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".gdn-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _look_up(kernel: str, statics: dict[str, Any]) -> Iterator[tuple[str, Path | KernelFileError]]:
    """Every place that has an entry of a kernel: what it is, and the path of its library or why it
    must not be used."""
    name = f"{key(kernel, statics)}.json"
    for what, folder in folders():
        try:
            entry = read_entry(folder / name)
            if entry is not None:
                _require_driver(entry, folder / name)
                if reason := unloadable.get(folder / entry.file):
                    raise KernelFileError(reason)
                yield what, folder / entry.file
        except KernelFileError as error:
            yield what, error


def find_all(kernel: str, statics: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Where a kernel is, and the path of its library, in order. An entry that must not be used is
    passed over, with a warning."""
    for what, found in _look_up(kernel, statics):
        if isinstance(found, Path):
            yield what, found
        else:
            _warn_once(str(found))


def find(kernel: str, statics: dict[str, Any]) -> tuple[str, Path] | None:
    """The first of `find_all`."""
    return next(find_all(kernel, statics), None)


def why_refused(kernel: str, statics: dict[str, Any]) -> str | None:
    """Why a folder's entry of this kernel must not be used, if there is such a folder."""
    errors = (str(found) for _, found in _look_up(kernel, statics) if not isinstance(found, Path))
    return next(errors, None)


# === loading ===


def _runtime() -> list[Path]:
    """The libraries. PackageNotFoundError if tilelang is not installed."""
    here = importlib.metadata.distribution("tilelang").locate_file("tilelang/lib")
    return [Path(str(here), name) for name in _RUNTIME]


def runtime_missing() -> str | None:
    """Why kernels cannot be loaded, or None."""
    try:
        missing = [path for path in _runtime() if not path.exists()]
    except importlib.metadata.PackageNotFoundError:
        return "not installed: tilelang"
    if missing:
        return f"missing in {missing[0].parent}: {', '.join(path.name for path in missing)}"
    return None if importlib.util.find_spec("tvm_ffi") else "not installed: apache-tvm-ffi"


@functools.cache
def _load_runtime() -> Any:
    """TVM's module of functions to load libraries with, after what these need."""
    import tvm_ffi

    for path in _runtime():
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi


def load(library: Path) -> Callable[..., None]:
    """The function that launches a library's kernel. Needs no GPU: the first launch loads it."""
    launch: Callable[..., None] = _load_runtime().load_module(str(library))["main"]
    return launch
