"""Training steps of gdn.nn's layer: activation checkpointing, whole and selective, autocast, and
one graph under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gdn.nn import GatedDeltaNet
from gdn.testing import TOLERANCE, relative_error

BOUNDS = [0, 3, 3, 41, 70]
RULE = torch.ops.gdn.forward.default


def make_layer(device: str, dtype: torch.dtype = torch.float32) -> GatedDeltaNet:
    torch.manual_seed(0)
    sizes = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 16, "head_v_dim": 16}
    return GatedDeltaNet(32, **sizes, backend="torch", device=device).to(dtype)


def make_input(device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, 70, 32, device=device), torch.tensor(BOUNDS, device=device)


def step(layer: GatedDeltaNet, run: Callable[..., Tensor], x: Tensor, **where: Any) -> list[Tensor]:
    """y, and the gradients of x and of all parameters."""
    leaf = x.detach().clone().requires_grad_()
    y = run(leaf, **where)
    found = torch.autograd.grad(y.float().square().sum(), [leaf, *layer.parameters()])
    return [y.detach(), *found]


class Counter(TorchDispatchMode):
    """How often the op runs forward."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is RULE
        return func(*args, **kwargs or {})


def keep_the_rule(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what the op returns, its saved tensors too, and compute all else again."""
    return CheckpointPolicy.MUST_SAVE if op is RULE else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, keep_the_rule)


@pytest.mark.parametrize(("options", "runs"), [({}, 2), ({"context_fn": SELECTIVE}, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing(device: str, options: dict[str, Any], runs: int, packed: bool) -> None:
    """The same gradients; a selective checkpoint need not run the op again."""
    layer, (x, ends) = make_layer(device), make_input(device)
    where = {"cu_seqlens": ends} if packed else {}
    expected = step(layer, layer, x, **where)
    run = functools.partial(checkpoint, layer, use_reentrant=False, **options)
    with Counter() as counter:
        got = step(layer, run, x, **where)
    assert counter.count == runs
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(device: str, packed: bool) -> None:
    """Parameters stay float32, and so do their gradients; nothing has more than twice the error of
    a layer that is bfloat16 as a whole."""
    layer, (x, ends) = make_layer(device), make_input(device)
    where = {"cu_seqlens": ends} if packed else {}

    def run(x: Tensor, **where: Any) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return layer(x, **where)

    got = step(layer, run, x, **where)
    exact = make_layer(device, torch.float64)
    truth = step(exact, exact, x.double(), **where)
    assert [t.dtype for t in got] == [torch.bfloat16, *[torch.float32] * (len(got) - 1)]
    whole = make_layer(device, torch.bfloat16)
    coarse = step(whole, whole, x.bfloat16(), **where)
    for one, other, exactly in zip(got, coarse, truth, strict=True):
        bound = max(TOLERANCE[torch.bfloat16], 2 * relative_error(other, exactly))
        assert relative_error(one, exactly) <= bound


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_compiles_into_one_graph(device: str, packed: bool) -> None:
    """Forward and backward, with the values of the eager step; other lengths compile nothing."""
    layer, (x, ends) = make_layer(device), make_input(device)
    where = {"cu_seqlens": ends} if packed else {}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for again in (False, True):
        tokens = torch.randn(1, 90, 32, device=device) if again else x
        with torch._dynamo.config.patch(error_on_recompile=again):
            got = step(layer, compiled, tokens, **where)
        for one, other in zip(got, step(layer, layer, tokens, **where), strict=True):
            assert relative_error(one, other) <= TOLERANCE[torch.float32]


def test_steps_compile_into_one_graph(device: str) -> None:
    """Single tokens through a cache, which the graph updates in place."""
    layer, (x, _) = make_layer(device), make_input(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager, cache = layer.make_cache(1), layer.make_cache(1)
    where = cache.conv.data_ptr(), cache.state.data_ptr()
    with torch.no_grad():
        for n in range(4):
            with torch._dynamo.config.patch(error_on_recompile=n > 0):
                got = compiled(x[:, n : n + 1], cache=cache)
            expected = layer(x[:, n : n + 1], cache=eager)
            assert relative_error(got, expected) <= TOLERANCE[torch.float32]
    assert (cache.conv.data_ptr(), cache.state.data_ptr()) == where
    assert torch.equal(cache.conv, eager.conv)
    assert relative_error(cache.state, eager.state) <= TOLERANCE[torch.float32]
