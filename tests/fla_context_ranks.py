"""fla's own functions with a context of its context parallelism, on the ranks of a gloo group: what
each process of `test_fla_context.py` runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from context_parallel_ranks import PER_TOKEN, SHARES, TOKENS, Parallel, loss_weights, outputs

from gdn.testing import make_inputs


def fla_agrees(rank: int, cases: Sequence[Parallel]) -> None:
    """With gdn registered: one rank's outputs and gradients against those of the whole sequences,
    in float64."""
    importlib.import_module("gdn.integrations.fla")
    for case in cases:
        try:
            check(rank, case)
        except Exception as error:
            raise AssertionError(f"{case.name}, rank {rank}") from error


def check(rank: int, case: Parallel) -> None:
    exact = make_inputs(case.case(torch.float64)) | {"output_final_state": False}
    assert "initial_state" not in exact
    bounds = exact.pop("cu_seqlens")
    assert len(bounds) > 2
    do, shares = loss_weights(case, exact)
    want = outputs(exact, do, shares[rank], "torch", cu_seqlens=bounds)

    kind = "kda" if exact["g"].dim() == 4 else "gated_delta_rule"
    function: Any = getattr(importlib.import_module(f"fla.ops.{kind}"), f"chunk_{kind}")
    build = importlib.import_module("fla.ops.cp").build_cp_context
    context = build(bounds, dist.group.WORLD, layout=case.layout)
    own = [token for tokens in case.ranges()[rank] for token in tokens]
    mine = {n: x[:, own] if n in TOKENS else x for n, x in exact.items()}

    def run(backend: str, **arguments: Any) -> Any:
        return function(**arguments)

    # the context goes before the call's own lengths, as in fla
    options = {"cp_context": context, "cu_seqlens": bounds, "cu_seqlens_cpu": bounds}
    got = outputs(mine, do[:, own], shares[rank], "torch", run, **options)
    assert got.keys() == want.keys()
    for name, x in got.items():
        if name in SHARES:
            dist.all_reduce(x)
        wanted = want[name][:, own] if name in PER_TOKEN else want[name]
        try:
            torch.testing.assert_close(x, wanted, rtol=1e-11, atol=1e-11)
        except AssertionError as error:
            raise AssertionError(name) from error
