"""Shorter copies of TileLang's headers for one kernel: nvcc reads a third less, and makes the same.

`wgmma.h` declares WGMMA products of every size, and includes a header of CUTLASS with 2 MB of sizes
that no kernel here has. The copy declares the sizes that the kernel's source names.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from tilelang.env import TILELANG_TEMPLATE_PATH

WGMMA = "tl_templates/cuda/instruction/wgmma.h"
EXTENSION = "#include <cute/arch/mma_sm90_gmma_ext.hpp>\n"
SIZES = {8, 16, 32, 64, 96, 128, 192, 256}
"""Columns of products that need no extension."""
_USED = re.compile(r"wgmma_(?:ss|rs)<(?:[\w:]+, ){3}64, (\d+), \d+,")
_LIST = re.compile(r"(#define TL_WGMMA_FOREACH_N_\w+_MUL8\(OP\)) *\\\n(?:.*\\\n)*.*\n")
_COMMON = '#include "../common.h"'


@functools.cache
def _full_text() -> str:
    return Path(TILELANG_TEMPLATE_PATH, WGMMA).read_text()


def write_short_headers(source: str, folder: Path) -> list[str]:
    """Write headers for a kernel's source into a folder. Returns the options by which nvcc finds
    them before TileLang's; none if they are not what is known here."""
    used = {int(n) for n in _USED.findall(source)}
    if not used or not used <= SIZES:
        return []
    try:
        text = _full_text()
    except OSError:
        return []
    short, lists = _LIST.subn(rf"\1 {' '.join(f'OP({n})' for n in sorted(used))}\n", text)
    if lists != 2 or EXTENSION not in short or _COMMON not in short:
        return []
    short = short.replace(EXTENSION, "").replace(_COMMON, "#include <tl_templates/cuda/common.h>")
    file = folder / WGMMA
    file.parent.mkdir(parents=True)
    file.write_text(short)
    return [f"-I{folder}"]
