"""gdn's plugin for SGLang on the names that it relies on: the choice, what takes it, and what gdn
refuses. `test_sglang_engine` drives the real SGLang."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_fake
import torch
from torch import Tensor

import gdn
from gdn.integrations import sglang as integration
from gdn.integrations import sglang_kernels

BOTH = {"linear_attn_decode_backend": "gdn", "linear_attn_prefill_backend": "gdn"}


@pytest.fixture
def layer() -> dict[str, Tensor | None]:
    """The pools of one layer."""
    H, HV, K, V = 2, 4, 16, 8
    conv = torch.zeros(1, 7, 2 * H * K + HV * V, 3)
    pool, drafts = torch.zeros(1, 7, HV, V, K), torch.zeros(1, 5, 3, HV, V, K)
    return {"pool": pool, "conv": conv, "drafts": drafts}


def start(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> sglang_fake.Fake:
    """A process of SGLang that has loaded gdn."""
    fake = sglang_fake.Fake(monkeypatch, **flags)
    once = functools.cache(integration._hook_backends.__wrapped__)
    monkeypatch.setattr(integration, "_hook_backends", once)
    integration.register()
    return fake


def kernels(backend: Any) -> dict[str, str]:
    """The class of each phase's kernel."""
    found = vars(backend.kernel_dispatcher)
    return {phase: type(found[place]).__name__ for phase, place in integration.PLACES.items()}


def test_the_choice_is_offered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = start(monkeypatch)
    integration.register()
    assert fake.choices == ["triton", "gdn"]
    assert len(fake.hooks) == len(fake.overrides) == 1


def test_an_unknown_sglang_gets_no_choice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = sglang_fake.Fake(monkeypatch)
    monkeypatch.delattr(sys.modules["sglang.srt.plugins.hook_registry"], "HookType")
    with caplog.at_level(logging.WARNING):
        integration.register()
    assert fake.choices == ["triton"]
    assert "gdn is no choice in SGLang 0.5.23: module" in caplog.text
    assert len(caplog.records) == 1


def test_the_flag_for_all_phases_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = start(monkeypatch).overrides["handle_linear_attn_backend"]
    passed: list[Any] = []
    with pytest.raises(
        ValueError, match=r"--linear-attn-backend must not be gdn, .*; pass --linear"
    ):
        hook(SimpleNamespace(linear_attn_backend="gdn"), passed.append)
    given = SimpleNamespace(linear_attn_backend="triton")
    hook(given, passed.append)
    assert passed == [given]


def test_without_the_choice_nothing_changes(monkeypatch: pytest.MonkeyPatch, layer: Any) -> None:
    fake = start(monkeypatch)
    backend = fake.make_backend(layer)
    assert set(kernels(backend).values()) == {"TritonGDNKernel"}
    assert len(fake.hooks) == 1
    assert not fake.lines


@pytest.mark.parametrize(
    ("flags", "ours"),
    [
        (BOTH, ["decode", "prefill", "verify"]),
        ({"linear_attn_decode_backend": "gdn"}, ["decode", "verify"]),
        ({"linear_attn_prefill_backend": "gdn"}, ["prefill"]),
        (BOTH | {"linear_attn_verify_backend": "triton"}, ["decode", "prefill"]),
    ],
)
def test_kernels_take_their_places(
    monkeypatch: pytest.MonkeyPatch, layer: Any, flags: dict[str, str], ours: list[str]
) -> None:
    fake = start(monkeypatch, **flags)
    backend = fake.make_backend(layer)
    assert [x for x, name in kernels(backend).items() if name == "GdnKernel"] == ours
    assert backend.kernel_dispatcher.supports_packed_decode == ("decode" in ours)
    assert type(backend.kernel_dispatcher.tree_verify_kernel).__name__ == "TritonGDNKernel"
    said = ", ".join(f"{phase} by torch" for phase in ours)
    assert fake.lines == [f"gdn in SGLang 0.5.23: {said}"]
    assert not any(x.any() for x in layer.values())  # the warm-up wrote nothing


@pytest.fixture
def own_mode() -> Iterator[None]:
    """The process is not batch-invariant afterwards."""
    yield
    gdn.set_batch_invariant(None)


@pytest.mark.usefixtures("own_mode")
def test_deterministic_inference_is_batch_invariant(
    monkeypatch: pytest.MonkeyPatch, layer: Any
) -> None:
    fake = start(monkeypatch, **BOTH, enable_deterministic_inference=True)
    assert set(kernels(fake.make_backend(layer)).values()) == {"GdnKernel"}
    assert fake.lines[0].startswith("gdn in SGLang 0.5.23, batch-invariant: decode by torch")
    with gdn.use_backend("fla"):
        fake.make_backend(layer)
    assert "batch invariance (gdn.batch_invariant) is not supported" in fake.lines[1]


def test_verification_needs_draft_states(monkeypatch: pytest.MonkeyPatch, layer: Any) -> None:
    fake = start(monkeypatch, **BOTH)
    backend = fake.make_backend(layer | {"drafts": None})
    assert kernels(backend)["verify"] == "TritonGDNKernel"
    assert fake.lines == ["gdn in SGLang 0.5.23: decode by torch, prefill by torch"]
    assert fake.make_backend({n: x[:0] for n, x in layer.items()}).kernel_dispatcher
    assert len(fake.lines) == 1  # a model without such layers


ALL = "decode and prefill and verify"


class XpuGDNAttnBackend(sglang_fake.GDNAttnBackend):
    """Another device's."""


class Changed(sglang_fake.LinearAttnKernelBase):
    """A later SGLang's."""

    decode = sglang_fake.TritonGDNKernel.decode
    target_verify = sglang_fake.TritonGDNKernel.target_verify

    def extend(self, q, k, v, g, beta, *, states, cache_indices, query_start_loc, **kwargs): ...


@pytest.mark.parametrize(
    ("flags", "more", "left", "reason"),
    [
        ({"enable_mis": True}, {}, "prefill", "gdn does not score several items at once"),
        ({}, {"chunk": 128}, "prefill", "checkpoints must be 64 tokens apart, got 128"),
        ({}, {"kind": XpuGDNAttnBackend}, ALL, "XpuGDNAttnBackend is no GDNAttnBackend"),
        ({}, {"kernel": Changed}, ALL, "SGLang's extend has no ssm_states; SGLang's kernel has"),
    ],
)
def test_what_gdn_refuses_stays_with_sglang(
    monkeypatch: pytest.MonkeyPatch, layer: Any, flags: Any, more: Any, left: str, reason: str
) -> None:
    own = more.pop("kernel", sglang_fake.TritonGDNKernel)
    monkeypatch.setattr(sglang_fake, "TritonGDNKernel", own)
    fake = start(monkeypatch, **BOTH, **flags)
    backend = fake.make_backend(layer, **more)
    assert " and ".join(x for x, name in kernels(backend).items() if name != "GdnKernel") == left
    (line,) = fake.lines
    assert f"{left} left to SGLang: {reason}" in line


def test_a_backend_that_cannot_run_the_calls_is_named(
    monkeypatch: pytest.MonkeyPatch, layer: Any
) -> None:
    """The request in force is heard; a list falls through, and one backend runs a phase."""
    fake = start(monkeypatch, **BOTH)
    with gdn.use_backend("fla"):  # it needs a GPU
        backend = fake.make_backend(layer)
    assert set(kernels(backend).values()) == {"TritonGDNKernel"}
    assert "left to SGLang: fla: " in fake.lines[0]
    with gdn.use_backend("fla,torch"):
        backend = fake.make_backend(layer)
    assert set(kernels(backend).values()) == {"GdnKernel"}
    assert fake.lines[1].endswith(": decode by torch, prefill by torch, verify by torch")


def test_a_backend_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, layer: Any) -> None:
    """The compiler of a package of another version, say."""
    fake = start(monkeypatch, linear_attn_prefill_backend="gdn")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no compiler\nat all")

    monkeypatch.setattr(sglang_kernels, "gated_delta_net_prefill", fail)
    with gdn.use_backend("torch"):
        backend = fake.make_backend(layer)
    assert set(kernels(backend).values()) == {"TritonGDNKernel"}
    assert fake.lines[0].endswith("prefill left to SGLang: torch: OSError: no compiler")


def test_no_server_on_a_gpu_runs_on_plain_pytorch_unasked(
    monkeypatch: pytest.MonkeyPatch, layer: Any
) -> None:
    """Tensors on the meta device stand for a GPU's: "auto" means gdn's own kernels there."""
    fake = start(monkeypatch, linear_attn_decode_backend="gdn")
    backend = fake.make_backend({name: x.to("meta") for name, x in layer.items()})
    assert set(kernels(backend).values()) == {"TritonGDNKernel"}
    assert "tilelang: " in fake.lines[0]
    assert "fla: " not in fake.lines[0]
    assert "torch: " not in fake.lines[0]


def test_kimi_delta_attention_stays_with_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = start(monkeypatch, linear_attn_decode_backend="gdn")
    chosen = fake.run("resolve_linear_attn_backends", fake.resolve)
    assert {chosen.decode, chosen.verify} == {sglang_fake.LinearAttnKernelBackend.TRITON}
    fake.run("KDAAttnBackend.__init__", None, None, None)
    assert fake.lines[0].startswith("gdn in SGLang 0.5.23: decode and verify left to SGLang: gdn s")
