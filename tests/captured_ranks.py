"""Context parallelism in a CUDA graph: what each process of `test_context_parallel.py` runs."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

import gdn
from gdn.compare.timing import capture
from gdn.testing import Case, gradients, make_inputs, with_gradients
from gdn.testing.inputs import make_output_gradients


def replay_agrees(rank: int, case: Case, lengths: tuple[int, ...], backend: str) -> None:
    """Forward and backward of a captured call on other inputs have the bits of eager calls."""
    device, part = torch.device("cuda", rank), replace(case, T=lengths[rank])
    cp = gdn.ContextParallel(dist.group.WORLD, lengths=lengths)
    first, second = (
        with_gradients(make_inputs(part, device, seed) | {"output_final_state": True})
        for seed in (rank, 9 + rank)
    )
    given = make_output_gradients(part, device)
    found: dict[str, torch.Tensor] = {}

    def run() -> None:
        outputs = gdn.gated_delta_net(**first, cp=cp, backend=backend)
        found.update({name: x.detach() for name, x in outputs._asdict().items()})
        found.update(gradients(outputs, first, given))

    graph = capture(run, "thread_local")
    captured = dict(found)
    with torch.no_grad():
        for name, x in first.items():
            if torch.is_tensor(x):
                x.copy_(second[name])
    graph.replay()
    got = {name: x.clone() for name, x in captured.items()}
    run()
    for name, x in found.items():
        assert torch.equal(got[name], x), name
