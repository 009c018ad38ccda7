"""The calls whose kernels `gdn build-kernels` builds: those of models, trainers and servers.

A call here has tensors on the meta device. Which kernels it needs is for its plan to say, so every
use comes with sizes that lead to each way of scanning sequences (`forward/plan.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn.problem import Call, PoolCall, Prefill, Step

from . import prebuilt
from .kernels import Job

SEQUENCES = ((1, 64, 16), (5, 64, 16), (16, 64, 16), (1, 4096, 32), (1, 2048, 4), (1, 32768, 16),
             (1, 32768, 20), (1, 32768, 32), (1, 32768, 48), (2, 32768, 64),
             (2, 64, 48))  # fmt: skip
"""B, T and HV: short, many, more scans than SMs, in segments, in pieces, in pieces of one kernel,
in halved pieces, in memory rounds of backward, in rounds of stretches, and in rounds with more
scans than SMs; three value heads a q/k head, whole."""
INVARIANT = (16, 64, 16)
"""Of batch-invariant calls, which take other kernels than these where there are more scans than
SMs."""
SHORT = (16, 32, 16)
"""Of prefill on pools: packs in which decode takes the sequences of one token."""
GROUPS = (1, 2, 3, 4)
"""Value heads a q/k head, which kernels of gradients are compiled for."""
STATES = ((False, False), (False, True), (True, True))
"""Whether there is an initial state, and whether the final one is returned."""
POOLS = (torch.float32, torch.bfloat16)


class Gates(NamedTuple):
    """How a model hands over q, k, g and beta. raw: the op computes the L2 norm, gate and sigmoid;
    norm: it computes the L2 norm; exact: beta is float32 like g, not in q's dtype."""

    raw: bool = False
    norm: bool = False
    exact: bool = False


GATES = (Gates(raw=True), Gates(norm=True), Gates(norm=True, exact=True), Gates())
"""Layers of gdn, transformers, float32 gates, and keys that are normalised before."""


def wanted_jobs(uses: Iterable[str], dtypes: Iterable[str], dims: Iterable[int]) -> list[Job]:
    """The kernels of some uses, dtypes (by name) and head sizes, in the order in which calls need
    them."""
    from . import BACKEND

    kinds = tuple(getattr(torch, name) for name in dtypes)
    jobs: dict[str, Job] = {}
    for call, backward in calls(tuple(uses), kinds, tuple(dims)):
        needed = BACKEND.warmup_jobs(call, backward)
        jobs |= {prebuilt.full_name(kernel.name, x): (kernel, x) for kernel, x in needed}
    return list(jobs.values())


def calls(
    uses: tuple[str, ...], dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...]
) -> Iterator[tuple[Call | PoolCall, bool]]:
    """The calls of some uses, dtypes and head sizes K = V, each with whether gradients follow."""
    for dtype, K, gates in itertools.product(dtypes, dims, GATES):
        for use in uses:
            made: Iterator[Call | PoolCall]
            if use == "decode":
                made = _steps(dtype, K, gates)
            elif use == "prefill":
                made = _prefills(dtype, K, gates)
            else:
                made = _sequences(dtype, K, gates, use == "training")
            yield from ((call, use == "training") for call in made)


def _sequences(dtype: torch.dtype, K: int, gates: Gates, backward: bool) -> Iterator[Call]:
    for (B, T, HV), (initial, final) in itertools.product(SEQUENCES, STATES):
        for group in GROUPS if backward else (1,):
            if HV % group:
                continue
            call = _tokens(dtype, (B, T, HV // group, HV), K, gates)._replace(
                output_final_state=final
            )
            packed = call._replace(**{
                name: x.flatten(0, 1)[None] for name in ("q", "k", "v", "g", "beta")
                if (x := getattr(call, name)) is not None
            })  # fmt: skip
            bounds = (None, torch.int32, torch.int64)
            for found, offsets in zip((call, packed, packed), bounds, strict=True):
                if offsets is not None:
                    found = found._replace(cu_seqlens=_meta(B + 1, dtype=offsets))
                if initial:
                    found = found._replace(initial_state=_meta(*found.state_shape))
                yield found
                if (B, T, HV) == INVARIANT:
                    yield found._replace(batch_invariant=True)


def _steps(dtype: torch.dtype, K: int, gates: Gates) -> Iterator[Step]:
    """Decode: servers hand over raw gates and slots, models have a state for each sequence."""
    call, HV = _tokens(dtype, (1, 1, 16, 16), K, gates), 16
    if gates.norm or gates.raw:
        yield Step(call, _meta(1, HV, K, K))
    if gates.raw:  # a model that was loaded in half precision
        low = _meta(HV, dtype=dtype)
        yield Step(call._replace(A_log=low, dt_bias=low), _meta(1, HV, K, K))
    if gates.raw:
        for pool, v_first in itertools.product(POOLS, (True, False)):
            state, slots = _meta(8, HV, K, K, dtype=pool), _meta(1, dtype=torch.int32)
            yield Step(call._replace(state_v_first=v_first), state, slots)


def _prefills(dtype: torch.dtype, K: int, gates: Gates) -> Iterator[Prefill]:
    """As vLLM and SGLang make them: packed, on pools [slots, HV, V, K], with and without
    checkpoints."""
    for pool, (B, T, HV) in itertools.product(POOLS, (*SEQUENCES, SHORT)):
        state, slots = _meta(8, HV, K, K, dtype=pool), _meta(B, dtype=torch.int32)
        call = _tokens(dtype, (1, B * T, HV, HV), K, gates)
        call = call._replace(state_v_first=True, cu_seqlens=_meta(B + 1, dtype=torch.int32))
        fresh, offsets = _meta(B, dtype=torch.bool), _meta(B, dtype=torch.int32)
        yield Prefill(call, state, slots, fresh)
        yield Prefill(call, state, slots, fresh, offsets, offsets)


def _tokens(dtype: torch.dtype, sizes: tuple[int, ...], K: int, gates: Gates) -> Call:
    B, T, H, HV = sizes
    gate_dtype = dtype if gates.raw else torch.float32
    q, v = _meta(B, T, H, K, dtype=dtype), _meta(B, T, HV, K, dtype=dtype)
    beta = _meta(B, T, HV, dtype=torch.float32 if gates.exact else dtype)
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": gates.raw or gates.norm}
    if gates.raw:
        options |= {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
        options |= {"A_log": _meta(HV), "dt_bias": _meta(HV)}
    return Call(q, q, v, _meta(B, T, HV, dtype=gate_dtype), beta, **options)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
