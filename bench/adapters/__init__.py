"""Third parties' engines as plug-ins, through the public registry, as any package outside this
repository could bring its own. None takes part in "auto".

The plan of an adapter that converts arguments has `convert(call)` and `restore(call, state)`, so
that the benchmarks can time the conversions apart from the kernels.
"""

from __future__ import annotations

import gdn
from gdn.backend import Backend


def register() -> tuple[Backend, ...]:
    """Register every adapter, and return them all."""
    from .flashinfer import FlashInfer
    from .flashqla import FlashQLA

    peers: tuple[Backend, ...] = (FlashQLA(), FlashInfer())
    for peer in peers:
        gdn.register_backend(peer, replace=True)
    return peers
