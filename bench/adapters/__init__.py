"""Other libraries as backends. They use the public registry, as any package outside this repository
can. "auto" never chooses them.

If an adapter converts arguments, its plan has `convert(call)` and `restore(call, state)`.
Benchmarks use these to time the conversions apart from the kernels.
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
