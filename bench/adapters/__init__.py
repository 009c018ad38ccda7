"""Other libraries as backends. They use the public registry, as any package outside this repository
can. "auto" never chooses them.

The plan of an adapter that converts arguments is a `ConvertingPlan`: benchmarks time its
conversions apart from the kernels.
"""

from __future__ import annotations

import gdn
from gdn.backend import Backend


def register() -> tuple[Backend, ...]:
    """Register every adapter, and return them all."""
    from .flashinfer import FlashInfer
    from .flashkda import FlashKDA
    from .flashqla import FlashQLA

    peers: tuple[Backend, ...] = (FlashQLA(), FlashInfer(), FlashKDA())
    for peer in peers:
        gdn.register_backend(peer, replace=True)
    return peers
