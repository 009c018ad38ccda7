"""gdn's kernels for SGLang against the definition, and its plugin on the names that it relies on.
`test_sglang_engine` drives the real ones."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_fake
import torch
from torch import Tensor

import gdn
from gdn.integrations import sglang as integration
from gdn.integrations.sglang_kernels import GATED, RAW, Kernel
from gdn.testing import TOLERANCE
from gdn.testing.decode import run_step_definition
from gdn.testing.prefill import run_prefill_definition

H, HV, K, V, SLOTS = 2, 4, 16, 8, 7
SIZES = [H * K, H * K, HV * V]
BOTH = {"linear_attn_decode_backend": "gdn", "linear_attn_prefill_backend": "gdn"}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def make_tokens(T: int) -> dict[str, Tensor]:
    """q, k, v [1, T, heads, size] as slices of one projection, and a, b [T, HV]."""
    q, k, v = draw(1, T, sum(SIZES)).split(SIZES, -1)
    tokens = {"q": q.unflatten(-1, (H, K)), "k": k.unflatten(-1, (H, K))}
    return tokens | {"v": v.unflatten(-1, (HV, V)), "a": draw(T, HV), "b": draw(T, HV) / 2}


GATE = {"A_log": draw(HV) / 2, "dt_bias": draw(HV + 1)[:HV]}


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("track", [False, True])
def test_extend(dtype: torch.dtype, track: bool) -> None:
    """Sequences go on from their slots; a tracked state is that after the chunks asked for."""
    pool, tokens = draw(SLOTS, HV, V, K).to(dtype), make_tokens(200)
    g, beta = -tokens.pop("a")[None].exp(), tokens.pop("b")[None].sigmoid()
    call = tokens | {"g": g, "beta": beta}
    places = {
        "state_indices": torch.tensor([4, -1, 2], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 130, 130, 195], dtype=torch.int32),
    }
    given: dict[str, Any] = {}
    if track:
        state = torch.full((3, HV, V, K), float("nan"))
        given = {"track_state": state, "track_chunk_idx": torch.tensor([2, -1, 1]).int()}
        places["checkpoint_offsets"] = torch.tensor([128, 0, 64])
        places["checkpoints"] = torch.zeros(3, HV, V, K, dtype=dtype)
    before = call | places | GATED | {"state": pool.clone()}
    expected, states, checkpoints = run_prefill_definition(before)
    output = torch.full((1, 200, HV, V), float("nan"))
    o, *rest = Kernel("torch").extend(
        **call, ssm_states=pool, cache_indices=places["state_indices"],
        query_start_loc=places["cu_seqlens"], output=output, layer_id=3, **given,
    )  # fmt: skip
    assert o is output
    assert rest == [None, None]
    agree(o[:, :195], expected[:, :195], dtype)
    assert o[:, 195:].isnan().all()  # padding of a captured graph
    agree(pool, states, dtype)
    if track:
        assert checkpoints is not None
        agree(state[[0, 2]], checkpoints[[0, 2]], dtype)


def test_extend_without_update_is_refused() -> None:
    tokens = make_tokens(3)
    a, b = tokens.pop("a")[None], tokens.pop("b")[None]
    pool, one = draw(SLOTS, HV, V, K), torch.ones(1, dtype=torch.int32)
    places = {"ssm_states": pool, "cache_indices": one, "query_start_loc": torch.tensor([0, 3])}
    with pytest.raises(NotImplementedError, match="inplace_update must be True, got False"):
        Kernel("torch").extend(**tokens, g=a, beta=b, inplace_update=False, **places)


@pytest.mark.parametrize("packed", [False, True])
def test_decode(packed: bool) -> None:
    pool, tokens = draw(SLOTS, HV, V, K), make_tokens(3)
    a, b = tokens.pop("a"), tokens.pop("b")
    slots = torch.tensor([3, -1, 5], dtype=torch.int32)
    steps = {name: x.transpose(0, 1) for name, x in tokens.items()}
    given = steps | {"g": a[:, None], "beta": b[:, None], "state": pool.clone(), **GATE, **RAW}
    expected, states = run_step_definition(given | {"state_indices": slots})
    places = {"ssm_states": pool, "cache_indices": slots}
    if packed:
        mixed = torch.cat([x[0].flatten(1) for x in tokens.values()], -1)
        sizes: Any = {"scale": K**-0.5, "num_v_heads": HV, "head_v_dim": V}
        o = Kernel("torch").packed_decode(mixed, a, b, **GATE, **places, **sizes)
    else:
        o = Kernel("torch").decode(
            **tokens, a=a, b=b, **GATE, **places, query_start_loc=torch.arange(4)
        )
    agree(o, expected.transpose(0, 1))
    agree(pool, states)
    assert not o[0, 1].any()


def test_verification_leaves_the_pool_alone() -> None:
    """A table of rows longer than the batch, as SGLang has it, and a padding row without tokens."""
    pool, tokens = draw(SLOTS, HV, V, K), make_tokens(6)
    a, b = tokens.pop("a"), tokens.pop("b")
    before, drafts = pool.clone(), torch.zeros(5, 4, HV, V, K)
    rows, slots = torch.arange(5, dtype=torch.int32), torch.tensor([3, 5, -1]).int()
    bounds = torch.tensor([0, 3, 6, 6], dtype=torch.int32)
    o = Kernel("torch").target_verify(
        *GATE.values(), **tokens, a=a, b=b, ssm_states=pool, cache_indices=slots,
        query_start_loc=bounds, intermediate_states_buffer=drafts, intermediate_state_indices=rows,
        cache_steps=3, retrieve_parent_token=None,
    )  # fmt: skip
    expected, states = run_step_definition(
        tokens | {"g": a[None], "beta": b[None], "state": before, "state_indices": slots, **GATE}
        | {"output_states": torch.zeros(20, HV, V, K), "cu_seqlens": bounds, **RAW}
        | {"output_indices": 4 * rows[:3, None] + torch.arange(3)}
    )  # fmt: skip
    assert torch.equal(pool, before)
    agree(o, expected)
    agree(drafts, states.view_as(drafts))
    assert drafts[:2, :3].all()
    assert not drafts[2:].any()


@pytest.fixture
def layer() -> dict[str, Tensor | None]:
    """The pools of one layer."""
    conv, drafts = torch.zeros(1, SLOTS, sum(SIZES), 3), torch.zeros(1, 5, 3, HV, V, K)
    return {"pool": torch.zeros(1, SLOTS, HV, V, K), "conv": conv, "drafts": drafts}


def start(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> sglang_fake.Fake:
    """A process of SGLang that has loaded gdn."""
    fake = sglang_fake.Fake(monkeypatch, **flags)
    integration._hook_backends.cache_clear()
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
        ({"enable_deterministic_inference": True}, {}, ALL, "gdn's results may depend on the"),
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


def test_no_server_on_a_gpu_runs_on_plain_pytorch_unasked(
    monkeypatch: pytest.MonkeyPatch, layer: Any
) -> None:
    """Tensors on the meta device stand for a GPU's: "auto" means gdn's own kernels there."""
    fake = start(monkeypatch, linear_attn_decode_backend="gdn")
    backend = fake.make_backend({name: x.to("meta") for name, x in layer.items()})
    assert set(kernels(backend).values()) == {"TritonGDNKernel"}
    for name, listed in {"tilelang": True, "triton": True, "fla": False, "torch": False}.items():
        assert (f"{name}: " in fake.lines[0]) == listed


def test_kimi_delta_attention_stays_with_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = start(monkeypatch, linear_attn_decode_backend="gdn")
    chosen = fake.run("resolve_linear_attn_backends", fake.resolve)
    assert {chosen.decode, chosen.verify} == {sglang_fake.LinearAttnKernelBackend.TRITON}
    fake.run("KDAAttnBackend.__init__", None, None, None)
    assert fake.lines[0].startswith("gdn in SGLang 0.5.23: decode and verify left to SGLang: gdn s")
