"""Context parallelism under torch.compile on the ranks of a group: what each process of
`test_context_parallel.py` runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from context_parallel_ranks import TOKENS, Parallel, loss_weights, outputs
from torch import Tensor

import gdn
from gdn.testing import make_inputs


def compile_agrees(rank: int) -> None:
    """The op, and a layer: one graph each, forward and backward, with the bits of the eager call;
    the layer's convolution, which is compiled as shifted products, rounds in its own way."""
    case = Parallel("compiled", (5, 9), (3, 8, 0, 3), options={"fused": True})
    inputs = make_inputs(case.case(torch.float32))
    inputs.pop("cu_seqlens")
    own = [token for tokens in case.ranges()[rank] for token in tokens]
    mine = {n: x[:, own] if n in TOKENS else x for n, x in inputs.items()}
    cp = gdn.ContextParallel(dist.group.WORLD, case.bounds(), lengths=case.lengths)
    do, shares = loss_weights(case, inputs)
    run = functools.partial(outputs, mine, do[:, own], shares[rank], "torch", cp=cp)
    compare_compiled(run, gdn.gated_delta_net, 0.0)

    layer = gdn.nn.GatedDeltaNet(8, num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=4)
    x, dy = torch.randn(2, 1, case.lengths[rank], 8)

    def run_layer(op: Callable[..., Any]) -> dict[str, Tensor]:
        leaves = {"x": x.clone().requires_grad_(), **dict(layer.named_parameters())}
        y = op(leaves["x"], cp=cp)
        found = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}

    compare_compiled(run_layer, layer, 1e-5)


def compare_compiled(
    run: Callable[..., dict[str, Tensor]], op: Callable[..., Any], tolerance: float
) -> None:
    """What `run(op=op)` returns, where op is compiled. A second call compiles nothing."""
    eager = run(op=op)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            got = run(op=compiled)
        assert got.keys() == eager.keys()
        torch.testing.assert_close(got, eager, rtol=tolerance, atol=tolerance)
