"""Calls on a pool of states as a server makes them: q, k, v and the gates are slices of
projections, norms and gates are fused, slots lie in no order. Timed with what they replace:

- prefill: the call without a pool, of contiguous tensors;
- every n: prefill without checkpoints; the one that is timed stores the state every n tokens;
- mixed: decode of the requests with one token, then prefill of the others.

FlashInfer's rows hold its norm, its gates and the copies of its inputs. Run with --pools.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters.flashinfer import prefill_on_pool
from shapes import POOL_SHAPES, expand, make_pool_case
from suite import DEVICE, DTYPE, ON_GPU

import gdn
from gdn.compare.comparison import plain_case
from gdn.compare.roofline import least_work
from gdn.compare.timing import Run, gpu_times, wall_times
from gdn.registry import find_backend
from gdn.testing import TOLERANCE, Case, make_inputs, relative_error

SHORT = 256
"""Requests with one token in a mixed batch."""


class PoolCall:
    """A case's tensors as slices, and a pool with twice as many slots as sequences."""

    def __init__(self, case: Case) -> None:
        self.case, self.plain = case, make_inputs(case, DEVICE)
        B, T = self.plain["q"].shape[:2]
        self.options = {n: x for n, x in self.plain.items() if n not in ("output_final_state",)}
        for names in (("q", "k", "v"), ("g", "beta")):
            parts = [self.plain[n].reshape(B, T, -1) for n in names]
            slices = torch.split(torch.cat(parts, -1), [x.shape[-1] for x in parts], -1)
            views = zip(names, slices, strict=True)
            self.options |= {n: x.view(self.plain[n].shape) for n, x in views}
        initial = self.options.pop("initial_state")
        self.slots = torch.randperm(2 * len(initial), device=DEVICE)[: len(initial)].int()
        self.pool = initial.new_zeros((2 * len(initial), *initial.shape[1:]))
        self.pool[self.slots.long()] = initial

    def prefill(self, backend: str, **more: Any) -> Callable[[], torch.Tensor]:
        """The call, on its own copy of the pool. Every call goes on from the states before it."""
        given = self.options | {"state": self.pool.clone(), "state_indices": self.slots} | more
        if backend == "flashinfer":
            return functools.partial(prefill_on_pool, **given)
        return functools.partial(gdn.gated_delta_net_prefill, **given, backend=backend)

    def without_pool(self, backend: str) -> Callable[[], object]:
        return functools.partial(gdn.gated_delta_net, **self.plain, backend=backend)

    def apart(self, backend: str) -> Callable[[], object]:
        """Decode of the first requests, which have one token each, then prefill of the others."""
        state, tokens = self.pool.clone(), ("q", "k", "v", "g", "beta")
        short = {n: self.options[n][0, :SHORT].unsqueeze(1) for n in tokens}
        long = {n: self.options[n][:, SHORT:] for n in tokens}
        bounds = self.options["cu_seqlens"][SHORT:] - SHORT

        def run() -> object:
            decoded = self.options | short | {"cu_seqlens": None, "state": state}
            gdn.gated_delta_net_decode(**decoded, state_indices=self.slots[:SHORT], backend=backend)
            rest = self.options | long | {"cu_seqlens": bounds, "state": state}
            return gdn.gated_delta_net_prefill(
                **rest, state_indices=self.slots[SHORT:], backend=backend
            )

        return run

    def checkpoints(self, every: int) -> dict[str, torch.Tensor]:
        """A buffer for the state after every so many tokens."""
        lengths = self.options["cu_seqlens"].diff()[:, None]
        ends = torch.arange(every, max(int(lengths.max()), every) + 1, every, device=DEVICE)
        offsets = torch.where(ends <= lengths, ends, 0).int()
        buffer = self.pool.new_empty((*offsets.shape, *self.pool.shape[1:]))
        return {"checkpoint_offsets": offsets, "checkpoints": buffer}


@functools.lru_cache(maxsize=1)  # one shape's tensors at a time
def made(case: Case) -> tuple[PoolCall, torch.Tensor]:
    """A case's tensors, and o by plain PyTorch."""
    call = PoolCall(case)
    return call, gdn.gated_delta_net(**call.plain, backend="torch").o


@pytest.fixture
def record_pool(request: pytest.FixtureRequest, record: Any) -> Any:
    """Time a call on a pool of one backend, and what it replaces, if o agrees."""
    if not request.config.getoption("pools"):
        pytest.skip("run with --pools")

    def time(shape: str, backend: str, work: str) -> None:
        peer = backend == "flashinfer"
        if peer and work not in ("prefill", "mixed"):
            pytest.skip("its checkpoints have another form")
        if not peer and not find_backend(backend).capabilities.checkpoints:
            pytest.skip("prefill on a pool with checkpoints is not supported")
        case = make_pool_case(shape, DTYPE)
        call, expected = made(case)
        every = int(work.split()[1]) if work.startswith("every") else 0
        more = call.checkpoints(every) if every else {}
        error = relative_error(call.prefill(backend, **more)(), expected)
        assert error <= TOLERANCE[DTYPE], f"relative error {error:.1e}"
        runs: dict[str, Run] = {"timed": call.prefill(backend, **more)}
        if every:
            runs["beside"] = call.prefill(backend)
        elif not peer:
            runs["beside"] = (call.apart if work == "mixed" else call.without_pool)(backend)
        seconds = request.config.getoption("seconds")
        graphs = dict.fromkeys(runs, True)
        times = gpu_times(runs, graphs, seconds) if ON_GPU else wall_times(runs, DEVICE, seconds)
        beside = times["beside"].ms if "beside" in times else None
        ratio = times["timed"].ms / beside if beside else None
        record(
            runs["timed"], times["timed"], least_work(case, "fwd"), seconds / 2, kind="pool",
            shape=shape, gates=case.gates, backend=backend, case=plain_case(case),
            tokens=case.tokens, errors={"o": error}, beside_ms=beside, ratio=ratio,
            **{"pass": work},
        )  # fmt: skip

    return time


@pytest.mark.parametrize("on_pool", expand(POOL_SHAPES[DEVICE.type, "prefill"]))
def test_prefill(record_pool: Any, on_pool: str, backend: str) -> None:
    record_pool(on_pool, backend, "prefill")


@pytest.mark.parametrize("every", [64, 256, 1024])
@pytest.mark.parametrize("on_pool", expand(POOL_SHAPES[DEVICE.type, "checkpoints"]))
def test_checkpoints(record_pool: Any, on_pool: str, every: int, backend: str) -> None:
    record_pool(on_pool, backend, f"every {every}")


@pytest.mark.parametrize("on_pool", POOL_SHAPES[DEVICE.type, "mixed"].split(","))
def test_mixed_batch(record_pool: Any, on_pool: str, backend: str) -> None:
    record_pool(on_pool, backend, "mixed")
