"""Neighbouring thread blocks kept within a chunk of each other."""

from __future__ import annotations

from typing import Any

import tilelang.language as T


class ClusterPace:
    """What keeps the programs of neighbouring columns of V, a cluster, a chunk apart at most: their
    halves of a token's row then come from memory together."""

    def __init__(self, programs: int) -> None:
        self.programs = programs
        if programs > 1:
            self.ready = T.alloc_cluster_barrier(programs)


@T.macro
def wait_for_cluster(pace: Any, chunk: Any, leads: Any) -> None:
    """Until all of them may load the chunk, by the warps that load; leads: one thread of each."""
    if pace.programs > 1:
        if leads:
            for program in T.unroll(pace.programs):
                T.mbarrier_arrive(pace.ready[0], program)
        T.barrier_wait(pace.ready[0], chunk % 2)
        T.sync_warp()  # or the one who leads is two phases on before all have seen this one
