"""Neighbouring thread blocks kept within one chunk of each other."""

from __future__ import annotations

from typing import Any

import tilelang.language as T


class ClusterPace:
    """A barrier over a cluster, the thread blocks of neighbouring columns of V.

    It keeps their producer warps within one chunk of each other. The halves of a token's row are
    then read from memory together, while its memory page is open.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        if size > 1:
            self.ready = T.alloc_cluster_barrier(size)


@T.macro
def wait_for_cluster(pace: Any, chunk: Any, leads: Any) -> None:
    """Wait until every producer warp of the cluster may load this chunk. leads: true for one thread
    of each producer warp."""
    if pace.size > 1:
        if leads:
            for cta in T.unroll(pace.size):
                T.mbarrier_arrive(pace.ready[0], cta)
        T.barrier_wait(pace.ready[0], chunk % 2)
        # Without this, the leading thread could be two phases ahead before its warp sees this one.
        T.sync_warp()
