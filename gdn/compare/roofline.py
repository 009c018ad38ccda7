"""The roofline: the least work in a pass, the measured ceilings of a device, and the least time
that follows from both."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch

from gdn.problem import CHUNK
from gdn.testing import Case
from gdn.testing.decode import StepCase

from .timing import Run, gpu_times, wall_times

PASSES = ("fwd", "bwd", "fwd+bwd")
"""Forward alone, backward alone, and forward followed by backward."""


class Work(NamedTuple):
    """The least work of any implementation: floating-point operations and bytes moved."""

    flops: float
    bytes: float


def least_work(case: Case, which: str) -> Work:
    """The work in one pass of the chunked algorithm.

    Operations, per chunk of C tokens and value head: K S, Q S and K^T U take 2 C K V each, K K^T
    and Q K^T take 2 C^2 K each, applying the inverse and P U take 2 C^2 V each, and the inverse
    takes C^3 / 2. Backward takes three times as many. Bytes: every input is read once and every
    output written once. Backward reads q, k, v, g, beta, the initial state and the gradients of o
    and of the final state, and writes a gradient for each input.
    """
    lengths = case.lengths if case.lengths is not None else (case.T,) * case.B
    chunks = sum(-(-length // CHUNK) for length in lengths)
    K, V, C = case.K, case.V, CHUNK
    forward = chunks * case.HV * (6 * C * K * V + 4 * C * C * (K + V) + C**3 / 2)
    tokens, size = sum(lengths), case.dtype.itemsize
    qk, vo, gates = 2 * case.H * K * size, case.HV * V * size, _gate_bytes(case)
    state = len(lengths) * case.HV * K * V * 4
    flops, moved = 0.0, 0
    if which != "bwd":
        flops += forward
        moved += tokens * (qk + 2 * vo + gates) + state * (1 + case.initial_state)
    if which != "fwd":
        flops += 3 * forward
        moved += tokens * (2 * qk + 3 * vo + 2 * gates) + state * (1 + 2 * case.initial_state)
    return Work(flops, float(moved))


def _gate_bytes(case: Case) -> int:
    """Bytes of g and beta of a token, in float32."""
    return 4 * case.HV * (1 + (case.K if case.per_channel else 1))


def least_step_work(case: StepCase) -> Work:
    """The work in one decode step that skips no sequence: per token and value head two products
    with the state, one update and one decay; each state is read once and written once."""
    tokens, size = case.tokens, case.dtype.itemsize
    state = case.HV * case.K * case.V
    a_token = (2 * case.H * case.K + 2 * case.HV * case.V) * size + _gate_bytes(case)
    moved = 2 * case.sequences * state * case.pool.itemsize + tokens * a_token
    return Work(7.0 * tokens * state, float(moved))


class Ceilings(NamedTuple):
    """Measured rates of a device: operations per second in a matrix product, bytes per second in a
    copy."""

    flops: float
    bytes: float

    def floor_ms(self, work: Work) -> float:
        """The least time that the work can take."""
        return 1e3 * max(work.flops / self.flops, work.bytes / self.bytes)


LARGEST_PRODUCT, SMALLEST_PRODUCT = 1536, 192
"""Rows of the matrices whose product is timed on a CPU."""
PRODUCT_SECONDS = 0.2
"""What one product on a CPU may take. PyTorch has no fast float16 kernel for most CPUs."""


def _product_size(device: torch.device, dtype: torch.dtype) -> int:
    """The rows of the largest product that does not take long, up to `LARGEST_PRODUCT`: doubled
    rows take eight times as long."""
    n = SMALLEST_PRODUCT
    while n < LARGEST_PRODUCT:
        a = torch.randn(n, n, device=device).to(dtype)
        seconds = []
        for _ in range(2):  # the first one also starts threads
            start = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - start)
        if 8 * min(seconds) > PRODUCT_SECONDS:
            break
        n *= 2
    return n


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings on random numbers: by a product of `dtype` matrices, and by negating an
    array larger than any cache (a plain copy may run on a slower copy engine)."""
    gpu = device.type == "cuda"
    n, size = (8192, 2**28) if gpu else (_product_size(device, dtype), 2**25)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {
        "product": lambda: a @ b,
        "copy": lambda: torch.neg(source, out=target),
    }
    if gpu:
        with torch.cuda.device(device):
            times = gpu_times(runs, dict.fromkeys(runs, True))
    else:
        times = wall_times(runs, device, budget=1.0)
    seconds = {name: timing.ms / 1e3 for name, timing in times.items()}
    return Ceilings(2 * n**3 / seconds["product"], 2 * source.nbytes / seconds["copy"])
