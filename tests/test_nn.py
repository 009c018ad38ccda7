"""gdn.nn: the layer equals transformers', whatever way its tokens come."""

from __future__ import annotations

from itertools import pairwise

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdn.nn
from gdn.nn import GatedDeltaNet
from gdn.testing import TOLERANCE, relative_error

HEADS = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 16, "head_v_dim": 24}
TIGHT = TOLERANCE[torch.float32]


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch, device: str) -> GatedDeltaNet:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    return GatedDeltaNet(32, **HEADS, backend="torch").to(device)


@pytest.mark.parametrize("kind", models.CLASSES)
def test_loads_the_hugging_face_layer_and_equals_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, device: str
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    models.make_plain(monkeypatch)
    theirs = models.make_layer(kind, device)
    ours = GatedDeltaNet(32, **HEADS, backend="torch").to(device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 70, 32, device=device)
    assert relative_error(ours(x).detach(), theirs(x).detach()) <= TIGHT


def test_pieces_through_a_cache_equal_the_whole(layer: GatedDeltaNet, device: str) -> None:
    """Sequences, steps of one and of several tokens, with and without gradients."""
    x = torch.randn(2, 90, 32, device=device)
    whole = layer(x)
    for grad in (False, True):
        cache, outputs, first = layer.make_cache(2), [], 0
        with torch.set_grad_enabled(grad):
            for tokens in (2, 70, 1, 1, 5, 11):
                outputs.append(layer(x[:, first : first + tokens], cache=cache))
                first += tokens
        assert relative_error(torch.cat(outputs, 1).detach(), whole.detach()) <= TIGHT
        assert outputs[-1].requires_grad == grad
        assert not cache.state.requires_grad


def test_packed_sequences_do_not_see_each_other(layer: GatedDeltaNet, device: str) -> None:
    bounds = [0, 3, 3, 40, 41, 90]
    x = torch.randn(1, 90, 32, device=device)
    packed = layer(x, cu_seqlens=torch.tensor(bounds, device=device, dtype=torch.int32))
    alone = [layer(x[:, a:b]) for a, b in pairwise(bounds) if b > a]
    assert relative_error(packed.detach(), torch.cat(alone, 1).detach()) <= TIGHT
    with pytest.raises(ValueError, match="cache must come without cu_seqlens, got both"):
        layer(x, cache=layer.make_cache(1), cu_seqlens=torch.tensor(bounds, device=device))


def test_the_convolution_by_causal_conv1d(
    monkeypatch: pytest.MonkeyPatch, layer: GatedDeltaNet, device: str
) -> None:
    """Where it is installed it gets [B, channels, T] and [channels, taps], and no cache."""
    x = torch.randn(2, 70, 32, device=device)
    expected = layer(x).detach()
    assert gdn.nn._causal_conv1d(x.mT, 4) is None
    calls = []

    def causal_conv1d_fn(x: Tensor, weight: Tensor, *, activation: str) -> Tensor:
        calls.append(activation)
        padded = F.pad(x, (weight.shape[1] - 1, 0))
        return F.silu(F.conv1d(padded, weight[:, None], groups=x.shape[1]))

    monkeypatch.setattr(gdn.nn, "_causal_conv1d", lambda x, taps: causal_conv1d_fn)
    assert relative_error(layer(x).detach(), expected) <= TIGHT
    layer(x, cache=layer.make_cache(2))
    assert calls == ["silu"]


def test_no_tokens(layer: GatedDeltaNet, device: str) -> None:
    x, cache = torch.randn(2, 0, 32, device=device), layer.make_cache(2)
    assert layer(x).shape == x.shape
    before = cache.conv.normal_().clone()
    assert layer(x, cache=cache).shape == x.shape
    assert torch.equal(cache.conv, before)


def test_every_parameter_learns(layer: GatedDeltaNet, device: str) -> None:
    layer(torch.randn(2, 70, 32, device=device)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
