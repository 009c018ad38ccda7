"""gdn.nn: the layer equals transformers', whatever way its tokens come."""

from __future__ import annotations

import functools
from itertools import pairwise

import models
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gdn.nn import GatedDeltaNet
from gdn.parts import refuse_kernels
from gdn.recomputation import copy_state
from gdn.testing import TOLERANCE, relative_error

HEADS = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 16, "head_v_dim": 24}
TIGHT = TOLERANCE[torch.float32]


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch, device: str) -> GatedDeltaNet:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    return GatedDeltaNet(32, **HEADS, backend="torch").to(device)


@pytest.mark.parametrize("kind", [kind for kind in models.CLASSES if kind != "olmo_hybrid"])
def test_loads_the_hugging_face_layer_and_equals_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, device: str
) -> None:
    """OLMo Hybrid's layer has a projection for each of q, k and v."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    models.make_plain(monkeypatch)
    theirs = models.make_layer(kind, device)
    ours = GatedDeltaNet(32, **HEADS, backend="torch").to(device)
    given = theirs.state_dict()
    ours.load_state_dict(given)
    x = torch.randn(2, 70, 32, device=device)
    assert relative_error(ours(x).detach(), theirs(x).detach()) <= TIGHT
    back = ours.qwen_state_dict()
    assert back.keys() == given.keys() or kind == "qwen3_next"
    if back.keys() == given.keys():
        assert all(torch.equal(back[name], value) for name, value in given.items())


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


BOUNDS = [0, 3, 3, 40, 41, 90, 90]


def convolve(
    layer: GatedDeltaNet, x: Tensor, weight: Tensor, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution of packed sequences, or of each alone, and gradients of x and of the taps."""
    x, taps = x.detach().requires_grad_(), layer.conv1d.weight
    if packed:
        out = layer._convolve(x, None, torch.tensor(BOUNDS, device=x.device, dtype=torch.int32))
    else:
        alone = [layer._convolve(x[:, a:b], None, None) for a, b in pairwise(BOUNDS)]
        out = torch.cat(alone, 1)
    dx, dtaps = torch.autograd.grad(out, (x, taps), weight)
    return out.detach(), dx, dtaps


def test_packed_and_dense_convolutions_round_alike(layer: GatedDeltaNet, device: str) -> None:
    """In bfloat16: the same bits on the CPU, and nowhere clearly more error than the dense one."""
    x, weight = torch.randn(2, 1, BOUNDS[-1], sum(layer.sizes), device=device).bfloat16()
    packed, dense = (convolve(layer.bfloat16(), x, weight, packed) for packed in (True, False))
    truth = convolve(layer.double(), x.double(), weight.double(), False)
    for one, other, exact in zip(packed, dense, truth, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        assert relative_error(one, exact) <= 1.1 * relative_error(other, exact)
    assert device != "cpu" or all(map(torch.equal, packed[:2], dense[:2]))


def test_packed_convolution_under_autocast(layer: GatedDeltaNet, device: str) -> None:
    x = torch.randn(1, BOUNDS[-1], 32, device=device)
    ends = torch.tensor(BOUNDS, device=device)
    with torch.autocast(device, torch.bfloat16):
        projected = layer.in_proj(x)[..., : sum(layer.sizes)]
        packed, dense = (layer._convolve(projected, None, given) for given in (ends, None))
        assert packed.dtype == dense.dtype == torch.bfloat16
        assert torch.equal(packed[:, :3], dense[:, :3])
        assert layer(x, cu_seqlens=ends).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_packed_convolution_does_not_wait_for_the_device() -> None:
    layer = GatedDeltaNet(32, **HEADS).cuda()
    x = torch.randn(1, BOUNDS[-1], sum(layer.sizes), device="cuda", requires_grad=True)
    ends = torch.tensor(BOUNDS, device="cuda")
    layer._convolve(x, None, ends).sum().backward()  # cuDNN and cuBLAS get ready
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer._convolve(x, None, ends).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("T", [5, 70])
def test_a_cache_under_checkpointing_is_refused(
    layer: GatedDeltaNet, device: str, use_reentrant: bool, T: int
) -> None:
    """The second run would start from the state that the first left. Without a cache, or without
    checkpointing, gradients are what they were."""
    x = torch.randn(2, T, 32, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)

    def gradient(out: Tensor) -> Tensor:
        x.grad = None
        out.square().sum().backward()
        assert x.grad is not None
        return x.grad

    cache = layer.make_cache(2)
    out = checkpoint(lambda x: layer(x, cache=cache), x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=r"cache must come outside of backward.*got a forward"):
        gradient(out)
    got = gradient(checkpoint(layer, x, use_reentrant=use_reentrant))
    assert relative_error(got, expected) <= TIGHT
    got = gradient(layer(x, cache=layer.make_cache(2)))
    assert relative_error(got, expected) <= TIGHT


@pytest.mark.parametrize("T", [5, 70])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("around", [True, False], ids=["compiled-around", "compiled-inside"])
def test_a_compiled_cache_under_checkpointing_is_refused(
    layer: GatedDeltaNet, device: str, around: bool, use_reentrant: bool, T: int
) -> None:
    """Compiled code cannot ask when it is compiled whether it will run in a backward pass."""
    x = torch.randn(2, T, 32, device=device, requires_grad=True)
    cache, run = layer.make_cache(2), functools.partial(checkpoint, use_reentrant=use_reentrant)
    if around:
        compiled = torch.compile(
            lambda x: run(lambda x: layer(x, cache=cache), x), backend="aot_eager"
        )
        out = compiled(x)
    else:
        compiled = torch.compile(layer, backend="aot_eager")
        out = run(lambda x: compiled(x, cache=cache), x)
    with pytest.raises(RuntimeError, match=r"cache must come outside of backward.*got a forward"):
        out.square().sum().backward()


def test_a_compiled_cache_has_the_same_gradients(layer: GatedDeltaNet, device: str) -> None:
    x = torch.randn(2, 20, 32, device=device, requires_grad=True)
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        cache = layer.make_cache(2)
        cache.state += 1.0
        out = run(x, cache=cache)
        found.append((*torch.autograd.grad(out.square().sum(), x), cache.state, cache.conv))
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= TIGHT


def test_opcheck_of_the_copy_of_a_state(device: str) -> None:
    torch.library.opcheck(copy_state, (torch.randn(2, 3, 4, 5, device=device, requires_grad=True),))


def test_a_cache_compiles_into_one_graph(layer: GatedDeltaNet, device: str) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 20, 32, device=device)
    with torch.no_grad():
        got = compiled(x, cache=layer.make_cache(2))
        assert relative_error(got, layer(x)) <= TIGHT


def test_kernels_take_plain_tensors() -> None:
    """Not DTensors, for one, whose storage they could not read."""

    class Other(Tensor):
        pass

    assert (
        refuse_kernels(torch.ones(1).as_subclass(Other)) == "kernels take plain tensors, got Other"
    )
