"""The fla adapter: the limits that capabilities cannot express, and the path that runs."""

from __future__ import annotations

import inspect
import os
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from gdn.backends import fla
from support import assert_close

import gdn
from gdn.problem import Call, Problem
from gdn.testing import Case, make_inputs
from gdn.testing.decode import STEPS, as_step, make_step, run_step_definition

HOPPER = Problem(
    B=1, T=8, H=2, HV=2, K=128, V=128, N=1, dtype=torch.bfloat16, device="cuda", sm=90,
    varlen=False, initial_state=False, needs_grad=True, flags=frozenset(),
)  # fmt: skip


def pretend(monkeypatch: pytest.MonkeyPatch, tilelang: bool, miscompiles: bool) -> None:
    monkeypatch.setattr(fla, "_tilelang_part", lambda: tilelang)
    monkeypatch.setattr(fla, "_triton_miscompiles", lambda: miscompiles)


def test_backward_on_hopper_needs_a_working_triton_or_tilelang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, tilelang=False, miscompiles=True)
    (reason,) = fla.BACKEND.unsupported(HOPPER)
    assert "backward on Hopper is wrong with Triton 3.4 to 3.7.0" in reason
    assert not fla.BACKEND.unsupported(replace(HOPPER, sm=80))
    assert not fla.BACKEND.unsupported(replace(HOPPER, needs_grad=False))
    pretend(monkeypatch, tilelang=False, miscompiles=False)
    assert not fla.BACKEND.unsupported(HOPPER)
    assert fla.BACKEND.path(HOPPER) == "Triton"
    pretend(monkeypatch, tilelang=True, miscompiles=True)
    assert not fla.BACKEND.unsupported(HOPPER)
    assert fla.BACKEND.path(HOPPER) == "Triton + TileLang"
    assert fla.BACKEND.path(replace(HOPPER, needs_grad=False)) == "Triton"


def test_backward_needs_even_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tilelang=True, miscompiles=True)
    (reason,) = fla.BACKEND.unsupported(replace(HOPPER, V=63))
    assert reason == "backward needs even K and V, got K = 128, V = 63"
    assert not fla.BACKEND.unsupported(replace(HOPPER, V=63, needs_grad=False))


KIMI = replace(HOPPER, per_channel=True)


def test_a_lower_bound_needs_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla's rule against Triton concerns the kernels for a decay per head alone."""
    pretend(monkeypatch, tilelang=False, miscompiles=True)
    bounded = replace(HOPPER, needs_grad=False, gate_lower_bound=-5.0)
    (reason,) = fla.BACKEND.unsupported(bounded)
    assert reason == "gate_lower_bound needs a decay per channel (g [B, T, HV, K])"
    assert not fla.BACKEND.unsupported(replace(bounded, per_channel=True))
    assert not fla.BACKEND.unsupported(KIMI)


@pytest.mark.parametrize("tilelang", [False, True])
def test_the_path_of_a_decay_per_channel(monkeypatch: pytest.MonkeyPatch, tilelang: bool) -> None:
    monkeypatch.setattr(fla, "_tilelang_channels", lambda: tilelang)
    engines = "Triton + TileLang" if tilelang else "Triton"
    path = fla.BACKEND.path
    assert path(KIMI) == f"{engines}, any gates"
    assert path(replace(KIMI, gate_lower_bound=-5.0)) == f"{engines}, bounded gates"
    assert path(replace(KIMI, gate_lower_bound=-6.0)) == f"{engines}, any gates"
    assert path(replace(KIMI, HV=4)) == "Triton, any gates"
    assert path(replace(KIMI, needs_grad=False)) == "Triton, any gates"
    decode = replace(KIMI, needs_grad=False, pool=torch.float32)
    assert path(decode) == "Triton, states gathered and scattered"
    for sizes in ({"K": 16}, {"V": 16}):
        assert bool(fla.BACKEND.unsupported(replace(KIMI, **sizes))) == tilelang


@pytest.mark.parametrize(("bound", "safe"), [(None, False), (-5.0, True), (-6.0, False)])
def test_a_decay_per_channel_reaches_chunk_kda(
    monkeypatch: pytest.MonkeyPatch, bound: float | None, safe: bool
) -> None:
    """By fla's names, past FlashKDA, with initial states in float32."""
    pytest.importorskip("fla")
    from fla.ops import kda
    from gdn.backends.fla import channels

    seen: dict[str, Any] = {}

    def marker(v: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        seen.update(options)
        return v, None

    assert channels._own_entry is not kda.chunk_kda
    assert channels._own_entry.__name__ == "chunk_kda"
    names = set(inspect.signature(channels._own_entry).parameters) | {"A_log", "dt_bias"}
    monkeypatch.setattr(channels, "_own_entry", marker)
    inputs = make_inputs(Case("kimi", T=3, fused=True, per_channel=True, gate_lower_bound=bound))
    inputs["initial_state"] = inputs["initial_state"].bfloat16()
    channels.forward_only(Call(**inputs))
    assert (seen["lower_bound"], seen["safe_gate"]) == (bound, safe)
    assert seen["initial_state"].dtype == torch.float32
    assert set(seen) <= names
    assert seen["dt_bias"].shape == (2, 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite tests it on the GPU")
@pytest.mark.parametrize("name", ["channels", "channels-packed"])
def test_decode_per_channel_agrees_under_tritons_interpreter(name: str) -> None:
    """With and without a lower bound."""
    pytest.importorskip("fla")
    from gdn.backends.fla.pool import decode

    case = next(case for case in STEPS if case.name == name)
    for bound in (None, -5.0) if case.fused else (None,):
        inputs = make_step(replace(case, gate_lower_bound=bound))
        expected_o, expected = run_step_definition(inputs)
        o = decode(as_step(inputs))
        assert_close("o", o, expected_o, torch.float32)
        assert_close("state", inputs["state"], expected, torch.float32)


@pytest.mark.gpu
def test_the_explained_path_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashQLA replaced by a marker: it is called if and only if `path` says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flash_qla = pytest.importorskip("flash_qla")
    inputs = make_inputs(Case("path", T=70, K=128, V=128, dtype=torch.bfloat16), "cuda")
    calls = []

    def marker(**kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(kwargs)
        return torch.zeros_like(kwargs["v"]), torch.zeros_like(kwargs["initial_state"])

    monkeypatch.setattr(flash_qla, "chunk_gated_delta_rule", marker)
    for value, expected in ((None, "Triton"), ("0", "Triton"), ("1", "FlashQLA")):
        monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
        if value is not None:
            monkeypatch.setenv("FLA_FLASH_QLA", value)
        paths = {v.name: v.path for v in gdn.explain(**inputs, backend="fla").verdicts}
        gdn.gated_delta_net(**inputs, backend="fla")
        assert paths["fla"] == expected
        assert bool(calls) == (expected == "FlashQLA")


@pytest.mark.parametrize(("value", "asked"), [(None, False), ("0", False), ("1", True)])
def test_flash_qla_is_asked_for_without_touching_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str | None, asked: bool
) -> None:
    """Threads share the environment, so a call must not set and unset the variable."""
    pytest.importorskip("fla")
    from gdn.backends.fla import prefill

    monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
    if value is not None:
        monkeypatch.setenv("FLA_FLASH_QLA", value)
    before, seen = dict(os.environ), []

    def marker(name: str) -> Any:
        def run(v: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
            seen.append((name, dict(os.environ) == before))
            return v, None

        return run

    assert prefill._own_entry is not prefill.chunk_gated_delta_rule
    monkeypatch.setattr(prefill, "chunk_gated_delta_rule", marker("dispatched"))
    monkeypatch.setattr(prefill, "_own_entry", marker("own"))
    prefill.forward_only(Call(**make_inputs(Case("asked", T=3))))
    assert seen == [("dispatched" if asked else "own", True)]


def test_fla_gets_contiguous_lengths_whose_identity_follows_their_values() -> None:
    """fla's kernels read them side by side, and it keeps its chunk tables by identity."""
    pytest.importorskip("fla")
    from gdn.backends.fla.prefill import for_fla

    inputs = make_inputs(Case("lengths", lengths=(64, 192)))
    plain = inputs["cu_seqlens"]
    strided = torch.stack([plain, plain + 7], -1)[:, 0]
    for lengths in (plain, strided):
        given = for_fla(Call(**inputs | {"cu_seqlens": lengths})).cu_seqlens
        assert given is not None
        assert given.is_contiguous()
        assert torch.equal(given, lengths)
    call = Call(**inputs)
    before = for_fla(call).cu_seqlens
    assert for_fla(call).cu_seqlens is before
    plain[1] = 192
    assert for_fla(call).cu_seqlens is not before
