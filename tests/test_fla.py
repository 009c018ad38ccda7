"""The fla adapter: the limits that capabilities cannot express, and the path that runs."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from gdn.backends import fla

import gdn
from gdn.problem import Call, Problem
from gdn.testing import Case, make_inputs

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
    from gdn.backends.fla.prefill import _for_fla

    inputs = make_inputs(Case("lengths", lengths=(64, 192)))
    plain = inputs["cu_seqlens"]
    strided = torch.stack([plain, plain + 7], -1)[:, 0]
    for lengths in (plain, strided):
        given = _for_fla(Call(**inputs | {"cu_seqlens": lengths})).cu_seqlens
        assert given is not None
        assert given.is_contiguous()
        assert torch.equal(given, lengths)
    call = Call(**inputs)
    before = _for_fla(call).cu_seqlens
    assert _for_fla(call).cu_seqlens is before
    plain[1] = 192
    assert _for_fla(call).cu_seqlens is not before
