"""`gdn.warmup` of the Triton backend: it compiles what the calls launch, and launches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import gdn
from gdn.testing import Case, gradients, make_inputs, make_output_gradients, with_gradients
from gdn.testing.decode import STEPS, make_step
from gdn.testing.prefill import PREFILLS, make_prefill

pytest.importorskip("triton")
from gdn.backends.triton import ahead, decode, launch

CASES = {
    case.name: case
    for case in (
        Case("dense", T=70, HV=4),
        Case("packed", lengths=(3, 70), K=64, fused=True, state_v_first=True),
        Case("pieces", T=1600, H=1, HV=1, K=16, V=16, initial_state=False),
        Case("channels", T=20, H=1, K=16, V=16, per_channel=True, fused=True),
    )
}
Launch = tuple[Any, ...]


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, method: str) -> Iterator[set[Launch]]:
    """What a method of stages is called with: kernel, constants, options, dtypes. Nothing runs."""
    found: set[Launch] = set()

    def record(self: launch.Stage, tensors: Any, *scale: float) -> None:
        dtypes = tuple(None if x is None else x.dtype for x in tensors)
        constants = tuple(sorted(self.kernel_constants.items()))
        options = tuple(sorted(self.options.items()))
        sizes = (self.grid, self.sizes)
        found.add((self.kernel.fn.__name__, constants, options, sizes, dtypes, len(scale)))

    with monkeypatch.context() as patch:
        patch.setattr(launch.Stage, method, record)
        for module in (ahead, decode):
            patch.setattr(module, "compiles_ahead", lambda: True)
        yield found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backward", [False, True])
def test_it_compiles_what_a_call_launches(
    monkeypatch: pytest.MonkeyPatch, name: str, backward: bool
) -> None:
    inputs = make_inputs(CASES[name])
    with recorded(monkeypatch, "compile") as compiled:
        assert gdn.warmup(**inputs, backward=backward, backend="triton") == "triton"
    with recorded(monkeypatch, "__call__") as launched:
        if backward:
            inputs = with_gradients(inputs)
        outputs = gdn.gated_delta_net(**inputs, backend="triton")
        if backward:
            into = make_output_gradients(CASES[name])
            for used in (slice(0, 1), slice(0, 2)):  # without and with the final state
                gradients(tuple(outputs)[used], inputs, into[used], again=True)
    assert compiled == launched
    assert len(compiled) >= (4 if backward else 2)


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_prefill_on_a_pool(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = next(case for case in PREFILLS if name in case.name)
    inputs = make_prefill(case)
    before = inputs["state"].clone()
    with recorded(monkeypatch, "compile") as compiled:
        assert gdn.warmup(**inputs, prefill=True, backend="triton") == "triton"
    assert torch.equal(before.nan_to_num(7), inputs["state"].nan_to_num(7))
    with recorded(monkeypatch, "__call__") as launched:
        gdn.gated_delta_net_prefill(**inputs, backend="triton")
    assert compiled == launched
    assert len(compiled) >= 2


def test_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_step(STEPS[0])
    with recorded(monkeypatch, "compile") as compiled:
        gdn.warmup(**inputs, backend="triton")
    with recorded(monkeypatch, "__call__") as launched:
        gdn.gated_delta_net_decode(**inputs, backend="triton")
    assert launched < compiled  # also other numbers of states, and other alignments


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_warm_call_compiles_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    inputs = with_gradients(make_inputs(CASES[name], "cuda"))
    gdn.warmup(**inputs, backend="triton")
    from triton.runtime.jit import JITFunction

    def compiles(self: Any, *args: Any, **options: Any) -> Any:
        raise AssertionError(f"{self.fn.__name__} compiles")

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    gdn.gated_delta_net(**inputs, backend="triton").o.sum().backward()
