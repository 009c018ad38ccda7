"""q, k, v, g and beta of any strides, forward and backward: slices of projections, of longer
tensors, and heads before tokens. Kernels give the same bits as for copies."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import TOKENS, capabilities_of, close, require

import gdn
from gdn.testing import Case, gradients, make_inputs, make_output_gradients, with_gradients

CASES = (
    Case("dense", T=130, B=2, HV=4, fused=True),
    Case("packed", lengths=(70, 0, 33), H=1, HV=2, state_v_first=True),
)


def projected(x: torch.Tensor) -> torch.Tensor:
    """x as a part of each token's row."""
    wide = torch.full((*x.shape[:2], 3 * x[0, 0].numel()), torch.nan, dtype=x.dtype)
    return wide.to(x.device).tensor_split(3, -1)[1].view(x.shape).copy_(x)


def shortened(x: torch.Tensor) -> torch.Tensor:
    """x as the first tokens of longer rows."""
    long = torch.full((x.shape[0], x.shape[1] + 9, *x.shape[2:]), torch.nan, dtype=x.dtype)
    return long.to(x.device)[:, : x.shape[1]].copy_(x)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """x with heads before tokens in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def run(backend: str, case: Case, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    o, state = gdn.gated_delta_net(**inputs, backend=backend)
    assert state is not None
    found = gradients((o, state), inputs, make_output_gradients(case, o.device))
    return {"o": o, "state": state} | found


@pytest.mark.parametrize("change", [projected, shortened, heads_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_strides_do_not_matter(
    backend: str, device: str, dtype: torch.dtype, case: Case, change: Any
) -> None:
    case = replace(case, dtype=dtype)
    plain = make_inputs(case, device)
    require(backend, plain)
    strided = plain | {n: change(plain[n]) for n in TOKENS}
    given = {n: x.detach().requires_grad_() for n, x in strided.items() if n in TOKENS}
    given = with_gradients(plain) | given
    assert not given["q"].is_contiguous() or case.B == 1
    expected = run(backend, case, with_gradients(plain))
    for name, x in run(backend, case, given).items():
        close(x, expected[name], dtype)
        same = torch.equal(x, expected[name])
        assert same or backend not in ("triton", "tilelang"), f"{name}: torch sums in other orders"


def measure(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call allocates at its peak, and the kernels that it launches."""
    call()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return peak, sum(event.device_type.name == "CUDA" for event in profile.events())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "tilelang"])
@pytest.mark.parametrize("prefill", [False, True], ids=["gradients", "prefill"])
def test_nothing_is_copied(name: str, prefill: bool) -> None:
    """As much memory at the peak, and as many kernels, as for contiguous tensors."""
    pytest.importorskip(name)
    claimed = capabilities_of(name)
    assert "cuda" in claimed.devices
    if prefill and not claimed.prefill:
        pytest.skip("no prefill on a pool")
    case = Case("memory", T=4096, H=4, HV=8, K=128, V=128, dtype=torch.bfloat16)
    plain = make_inputs(case, "cuda")
    strided = plain | {n: projected(plain[n]) for n in TOKENS}
    pool = torch.zeros(1, 8, 128, 128, device="cuda")

    def measured(inputs: dict[str, Any]) -> tuple[int, int]:
        if prefill:
            given = {n: x for n, x in inputs.items() if n not in ("initial_state",)}
            given.pop("output_final_state", None)

            def call() -> None:
                gdn.gated_delta_net_prefill(**given, state=pool, backend=name)
        else:
            leaves = inputs | {n: inputs[n].detach().requires_grad_() for n in TOKENS}

            def call() -> None:
                run(name, case, leaves | {"initial_state": None})

        return measure(call)

    assert measured(strided) == measured(plain)
