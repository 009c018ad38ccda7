"""transformers' models with a decay per head, tiny and random: gdn changes none of their
numbers."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import gdn
from gdn.integrations.transformers_functions import run_sequences, run_tokens
from gdn.testing import TOLERANCE, relative_error

pytest.importorskip("transformers", reason="transformers is not installed")
models = importlib.import_module("models")
integration = importlib.import_module("gdn.integrations.transformers")
make_model, modelling, run_pieces = models.make_model, models.modelling, models.run_pieces
padded = models.padded


kind, plain = models.kind, models.plain  # fixtures


def require(backend: str, device: str, dtype: torch.dtype) -> None:
    """Skip backends that cannot run here at all; that they refuse is tested elsewhere."""
    tensors = [torch.empty(1, 1, 1, 16, device=device, dtype=dtype)] * 3
    tensors += [torch.empty(1, 1, 1, device=device)] * 2
    reasons = {v.name: v.reasons for v in gdn.explain(*tensors).verdicts}[backend]
    if reasons:
        pytest.skip("; ".join(reasons))


def logits_and_gradients(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    gradients = {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}
    return {"logits": out.logits.detach()} | gradients


def test_logits_and_gradients(backend: str, device: str, dtype: torch.dtype, kind: str) -> None:
    """Against the unpatched model in float32; where that is not the dtype, twice the unpatched
    model's own error will do."""
    require(backend, device, dtype)
    model, inputs = make_model(kind, device, dtype), padded(device)
    expected = logits_and_gradients(model, inputs)
    with integration.patch(model, backend=backend):
        got = logits_and_gradients(model, inputs)
    truth = logits_and_gradients(model.float(), inputs)
    assert set(got) == set(expected)
    assert not all(torch.equal(got[n], x) for n, x in expected.items())  # something else ran
    for name, x in truth.items():
        bound = max(TOLERANCE[dtype], 2 * relative_error(expected[name], x))
        assert relative_error(got[name], x) <= bound, name


def test_greedy_generation_with_cache(backend: str, device: str, kind: str) -> None:
    require(backend, device, torch.float32)
    model, inputs = make_model(kind, device), padded(device)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    with integration.patch(model, backend=backend):
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_chunked_prefill_and_continuation(backend: str, device: str, kind: str) -> None:
    """Two long pieces, a token, and a few more: as unpatched."""
    require(backend, device, torch.float32)
    model, ids = make_model(kind, device), padded(device)["input_ids"]
    expected = run_pieces(model, ids, (30, 30, 1, 4))
    with integration.patch(model, backend=backend):
        got = run_pieces(model, ids, (30, 30, 1, 4))
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) <= TOLERANCE[torch.float32]


def test_a_token_sees_neither_padding_nor_what_follows(backend: str, device: str) -> None:
    """Two of transformers' own tests: padding on the left changes nothing; nor do more tokens in
    the same call with a cache (unless this transformers forgets its state there)."""
    require(backend, device, torch.float32)
    model, inputs = make_model("qwen3_next", device), padded(device, 30)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def leak() -> float:
        one, more = (run_pieces(model, ids, (8, after))[1][:, :1] for after in (1, 8))
        return relative_error(more, one)

    remembers = leak() <= TOLERANCE[torch.float32]
    with integration.patch(model, backend=backend), torch.no_grad():
        assert leak() <= TOLERANCE[torch.float32] or not remembers
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        together = model(ids, attention_mask=mask, position_ids=places).logits
        alone = model(ids[1:, 9:]).logits
    assert relative_error(together[1:, 9:], alone) <= TOLERANCE[torch.float32]


def test_packed_sequences(backend: str, device: str, dtype: torch.dtype, kind: str) -> None:
    """As each alone, unpatched, gradients too; or refused, where the convolution mixes them."""
    require(backend, device, dtype)
    model, (packed, alone) = make_model(kind, device, dtype), models.make_packed(device)
    with integration.patch(model, backend=backend):
        if not models.keeps_packed_apart(kind):
            for name in ("cu_seq_lens_q", "seq_idx"):
                with pytest.raises(ValueError, match=f"{name} must come with transformers 5.15"):
                    model(packed["input_ids"], **{name: packed["cu_seq_lens_q"]})
            make_model(kind, device, dtype)(**packed)  # another model, which is not patched
            return
        got = models.run_all(model, [packed])
    expected, truth = models.run_all(model, alone), models.run_all(model.float(), alone)
    for name, x in truth.items():
        bound = max(TOLERANCE[dtype], 2 * relative_error(expected[name], x))
        assert relative_error(got[name], x) <= bound, name


def test_packed_sequences_and_caches(kind: str) -> None:
    """A cache serves one packed sequence. The bounds come as cu_seq_lens_q, not as seq_idx."""
    if not models.keeps_packed_apart(kind):
        pytest.skip("this transformers is refused packed sequences")
    model, ids = make_model(kind, "cpu"), padded("cpu")["input_ids"][:1]
    ends = torch.tensor([0, 30, 70], dtype=torch.int32)
    with integration.patch(model, backend="torch"):
        one, other = (run_pieces(model, ids, (2, 30, 5, 1), packed=x) for x in (True, False))
        assert relative_error(torch.cat(one, 1), torch.cat(other, 1)) <= TOLERANCE[torch.float32]
        cache = model(ids, cu_seq_lens_q=ends, use_cache=True)[models.cache_name(model)]
        with pytest.raises(ValueError, match="cu_seq_lens_q must come without earlier tokens"):
            model(ids, cu_seq_lens_q=ends, **{models.cache_name(model): cache})
        with pytest.raises(ValueError, match=r"seq_idx must come with cu_seq_lens_q.*got None"):
            model(ids, seq_idx=torch.zeros_like(ids))


def test_beams_and_checkpoints(kind: str) -> None:
    """Beam search reorders states; checkpoints run the forward pass again for the backward pass."""
    model, inputs = make_model(kind, "cpu"), padded("cpu")
    options = {"max_new_tokens": 5, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    beams = model.generate(**inputs, **options, do_sample=False)
    expected = logits_and_gradients(model, inputs)
    with integration.patch(model, backend="torch"):
        assert torch.equal(model.generate(**inputs, **options, do_sample=False), beams)
        name = "activation_checkpointing_enable"  # of transformers 5; and before
        name = name if hasattr(model, name) else "gradient_checkpointing_enable"
        getattr(model, name)({"use_reentrant": False})
        model.train()
        got = logits_and_gradients(model, inputs | {"use_cache": False})
    for name, x in expected.items():
        assert relative_error(got[name], x) <= TOLERANCE[torch.float32], name


def test_copies_and_saved_models(tmp_path: Path, kind: str) -> None:
    """A patched model is copied and saved like any other."""
    model, inputs = make_model(kind, "cpu"), padded("cpu", 20)
    expected = model(**inputs).logits
    with integration.patch(model, backend="torch"):
        copied = copy.deepcopy(model)
        patched = copied(**inputs).logits
        model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).logits, expected)
    assert torch.equal(copied(**inputs).logits, expected)
    assert relative_error(patched, expected) <= TOLERANCE[torch.float32]


def test_stray_arguments_are_dropped() -> None:
    q, v, g = torch.randn(1, 3, 1, 8), torch.randn(1, 3, 2, 8), -torch.rand(1, 3, 2)
    for run in (run_sequences, run_tokens):
        plain = run("torch", q, q, v, g=g, beta=-g, output_final_state=True)
        stray = {"chunk_size": 64, "head_first": False, "cu_seqlens": None, "seq_idx": None}
        got = run("torch", q, q, v, g=g, beta=-g, output_final_state=True, **stray)
        assert all(torch.equal(a, b) for a, b in zip(plain, got, strict=True))


@pytest.mark.parametrize("T", [1, 9])
def test_sequences_and_steps_grouped_heads_and_packs(backend: str, device: str, T: int) -> None:
    """What the functions compute does not depend on which of them is called, on whether q and k
    come repeated for grouped heads, or on whether sequences come packed."""
    require(backend, device, torch.float32)
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, T, 2, 8, device=device)
    v, state = torch.randn(2, T, 4, 16, device=device), torch.randn(2, 4, 8, 16, device=device)
    g, beta = -torch.rand(2, T, 4, device=device), torch.rand(2, T, 4, device=device)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected = run_sequences(backend, q, k, v, g=g, beta=beta, initial_state=state, **options)
    q2, k2 = (x.repeat_interleave(2, 2) for x in (q, k))
    packed = [x.flatten(0, 1)[None] for x in (q, k, v, g, beta)]
    ends = torch.tensor([0, T, 2 * T], device=device, dtype=torch.int32)
    functions: Any = (run_sequences, run_tokens)
    for run in functions:
        for tensors, more in (
            ((q, k, v, g, beta), {}),
            ((q2, k2, v, g, beta), {}),
            (packed, {"cu_seqlens": ends}),
        ):
            o, after = run(backend, *tensors, initial_state=state, **options, **more)
            assert relative_error(o.reshape(v.shape), expected[0]) <= TOLERANCE[torch.float32]
            assert relative_error(after, expected[1]) <= TOLERANCE[torch.float32]


def test_a_step_leaves_the_callers_state_alone() -> None:
    q, v, g = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 2, 8), -torch.rand(1, 1, 2)
    state = torch.randn(1, 2, 8, 8)
    before = state.clone()
    step = {"initial_state": state, "output_final_state": True}
    o, after = run_tokens("torch", q, q, v, g, -g, **step)
    expected = gdn.gated_delta_net(q, q, v, g, -g, **step)
    assert torch.equal(state, before)
    torch.testing.assert_close((o, after), tuple(expected))
