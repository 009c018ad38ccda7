"""The short convolution and the gated norm of a layer: every engine against float64, gradients too,
and the layer on kernels against itself on PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import layer_kernels
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdn import convolution, gated_norm
from gdn.nn import GatedDeltaNet
from gdn.testing import TOLERANCE, relative_error

BOUNDS = [0, 3, 3, 70, 71, 150]
"""Of packed sequences; one is empty, and the last 7 tokens are padding."""
T, CHANNELS, TAPS = 157, 16, 4
DTYPES = [torch.float32, torch.bfloat16]


fla_kernels = layer_kernels.fla_kernels  # a fixture


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
) -> Tensor:
    """What causal-conv1d documents, in PyTorch: x [B, channels, T]; channels lie side by side where
    there are sequences or states."""
    assert activation == "silu"
    if seq_idx is None:
        before = F.pad(x, (weight.shape[1] - 1, 0))
        if initial_states is not None:
            assert x.stride(1) == initial_states.stride(1) == 1
            before = torch.cat([initial_states, x], -1)
        return F.silu(F.conv1d(before, weight[:, None], groups=x.shape[1]))
    assert x.stride(1) == 1
    assert seq_idx.dtype == torch.int32
    assert seq_idx.shape == (x.shape[0], x.shape[2])
    _, lengths = seq_idx[0].unique_consecutive(return_counts=True)
    pieces = x.split(lengths.tolist(), -1)
    return torch.cat([causal_conv1d_fn(p, weight, activation=activation) for p in pieces], -1)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, *, activation: str
) -> Tensor:
    """Likewise for a few tokens; conv_state [B, channels, at least taps - 1] moves on in place."""
    rows = torch.cat([conv_state, x], -1)
    conv_state.copy_(rows[..., -conv_state.shape[2] :])
    out = F.silu(F.conv1d(rows, weight[:, None], groups=x.shape[1]))
    return out[..., -x.shape[2] :]


@pytest.fixture(params=["torch", "shifts", "fla", "causal-conv1d"])
def engine(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything that can run a convolution. On a CPU causal-conv1d is the stand-in above."""
    if request.param == "fla":
        request.getfixturevalue("fla_kernels")
    if request.param == "causal-conv1d":
        if device == "cpu":
            stand_in = SimpleNamespace(
                causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update
            )
            load = convolution.load
            monkeypatch.setattr(
                convolution, "load", lambda n: stand_in if n == "causal_conv1d" else load(n)
            )
        elif convolution.load("causal_conv1d") is None:
            pytest.skip("causal-conv1d is not installed")
    return request.param


def run_convolution(engine: str) -> Callable[..., Tensor]:
    return convolution._by_shifts if engine == "shifts" else convolution._RUN[engine]


def alone(x: Tensor, weight: Tensor) -> Tensor:
    rows = F.pad(x.mT, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(rows, weight[:, None], groups=x.shape[2])).mT


def with_gradients(run: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_close(got: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for one, exact in zip(got, truth, strict=True):
        assert one.dtype == dtype
        assert relative_error(one, exact) <= TOLERANCE[dtype]


def make_projected(device: str, dtype: torch.dtype, B: int = 1) -> Tensor:
    """Channels of a wider projection, as the layer has them."""
    torch.manual_seed(0)
    return torch.randn(B, T, CHANNELS + 24, device=device).to(dtype)[..., :CHANNELS]


def test_gradients_are_those_before_the_cache_moves_on(
    engine: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "shifts":
        pytest.skip("for compiled code, which a test of the layer covers")
    layer_kernels.choose_kernels(monkeypatch, engine)
    x = make_projected(device, torch.float32).contiguous()
    weight, cache = torch.randn(CHANNELS, TAPS, device=device), torch.zeros(1, CHANNELS, TAPS)
    cache, dy = cache.to(device), torch.randn_like(x)
    got = with_gradients(
        lambda *leaves: convolution.short_convolution(*leaves, cache=cache), dy, x, weight
    )
    assert torch.equal(cache, x[:, -TAPS:].mT)
    wide = with_gradients(alone, dy.double(), x.double(), weight.double())
    assert_close(got, wide, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "packed", "cached"])
def test_convolution(engine: str, device: str, dtype: torch.dtype, kind: str) -> None:
    """Against each sequence alone, in float64. Padding has finite results, and its gradients reach
    no other token."""
    x = make_projected(device, dtype, 1 if kind == "packed" else 2)
    weight, dy = torch.randn(CHANNELS, TAPS, device=device).to(dtype), torch.randn_like(x)
    cache, bounds = None, None
    wide = [x.double(), weight.double()]
    if kind == "packed":
        bounds = torch.tensor(BOUNDS, device=device, dtype=torch.int32)
        dy[:, BOUNDS[-1] :] = 0

        def exact(x: Tensor, weight: Tensor) -> Tensor:
            ends = [*BOUNDS, T]
            return torch.cat([alone(x[:, a:b], weight) for a, b in pairwise(ends) if b > a], 1)
    elif kind == "cached":
        cache = torch.randn(2, CHANNELS, TAPS, device=device).to(dtype)

        def exact(x: Tensor, weight: Tensor) -> Tensor:
            return alone(torch.cat([cache.double().mT, x], 1), weight)[:, TAPS:]
    else:
        exact = alone

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return run_convolution(engine)(x, weight, cache, bounds)

    got, truth = (with_gradients(f, dy, *t) for f, t in ((run, (x, weight)), (exact, wide)))
    assert got[0].isfinite().all()
    assert not got[1][:, BOUNDS[-1] :].any() or kind != "packed"
    if bounds is not None:
        got[0], truth[0] = got[0][:, : BOUNDS[-1]], truth[0][:, : BOUNDS[-1]]
    assert_close(got, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_go_on_where_sequences_end(
    monkeypatch: pytest.MonkeyPatch, engine: str, device: str, dtype: torch.dtype
) -> None:
    """A sequence, single tokens and a few together, through one cache: as the whole."""
    if engine == "shifts":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        layer_kernels.choose_kernels(monkeypatch, engine)
    x = make_projected(device, dtype, 2)
    weight = torch.randn(CHANNELS, TAPS, device=device).to(dtype)
    cache = torch.zeros(2, CHANNELS, TAPS, device=device, dtype=dtype)
    with torch.no_grad():
        pieces = x.split([2, 100, 1, 1, 5, 48], 1)
        found = [
            (convolution.convolve_step if piece.shape[1] <= 5 else convolution.short_convolution)(
                piece, weight, cache=cache
            )
            for piece in pieces
        ]
    assert (
        relative_error(torch.cat(found, 1), alone(x.double(), weight.double()))
        <= (TOLERANCE[dtype])
    )
    assert torch.equal(cache, x.mT[..., -TAPS:])


def norm_by_pytorch(x: Tensor, gate: Tensor, weight: Tensor, activation: str) -> Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return weight * x * scale * getattr(F, activation)(gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("shape", [(2, 37, 3, 24), (50, 16), (0, 16)], ids=["heads", "rows", "no"])
def test_gated_norm(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    activation: str,
    shape: tuple[int, ...],
) -> None:
    """The kernels on a gate that is a slice of a wider tensor, several tiles a program."""
    kernel: Any = importlib.import_module("gdn.backends.triton.gated_norm")
    monkeypatch.setattr(kernel, "_TILE", 256)
    monkeypatch.setattr(kernel, "_PROGRAMS", 3)
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape, device=device).to(dtype)
    wide = torch.randn(*shape[:-2], shape[-2] * shape[-1] + 40, device=device).to(dtype)
    gate = wide[..., 8 : 8 + shape[-2] * shape[-1]].unflatten(-1, shape[-2:])
    if len(shape) == 2:
        gate = torch.randn(shape[0], shape[1] + 8, device=device).to(dtype)[:, 8:]
    weight = torch.randn(shape[-1], device=device).to(dtype)

    def run(*inputs: Tensor) -> Tensor:
        return kernel.gated_norm(*inputs, 1e-6, activation == "sigmoid")

    def exact(*inputs: Tensor) -> Tensor:
        return norm_by_pytorch(*inputs, activation)

    got = with_gradients(run, dy, x, gate, weight)
    truth = with_gradients(exact, dy, x.double(), gate.double(), weight.double())
    assert_close(got, truth, dtype)


def test_gated_norm_by_pytorch_is_differentiable_in_float64(device: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(*n, device=device).double() for n in ((3, 2, 8), (3, 2, 8), (8,))]
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *t: gated_norm.gated_rms_norm(*t, 1e-6), leaves)
    rows = [torch.randn(*n, device=device).double().requires_grad_() for n in ((1, 9, 3), (3, 4))]
    bounds = torch.tensor([0, 2, 2, 9], device=device)
    for run in (convolution._by_torch, convolution._by_shifts):
        assert torch.autograd.gradcheck(lambda x, w, run=run: run(x, w, None, bounds), rows)


def make_layer(device: str) -> GatedDeltaNet:
    torch.manual_seed(0)
    sizes = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 8, "head_v_dim": 16}
    return GatedDeltaNet(16, **sizes, backend="torch", device=device)


def run_layer(layer: GatedDeltaNet, x: Tensor, **where: Any) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf, **where)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])]


def test_a_layer_on_kernels_equals_itself_on_pytorch(
    monkeypatch: pytest.MonkeyPatch, device: str, fla_kernels: Any
) -> None:
    """Dense, packed and from a cache; and `explain` names the kernels. On a CPU Triton's
    interpreter runs them."""
    layer = make_layer(device)
    x = torch.randn(1, 70, 16, device=device)
    bounds = torch.tensor([0, 3, 3, 41, 70], device=device, dtype=torch.int32)

    def run_all() -> list[Tensor]:
        cache = layer.make_cache(1)
        with torch.no_grad():
            pieces = [layer(p, cache=cache) for p in x.split([10, 1, 3, 56], 1)]
        packed = run_layer(layer, x, cu_seqlens=bounds)
        return [*run_layer(layer, x), *packed, *pieces, cache.conv, cache.state]

    for module in (convolution, gated_norm):
        monkeypatch.setattr(module, "refuse_kernels", lambda x: "not now")
    expected = run_all()
    assert "torch (not now)" in str(layer.explain(x))
    layer_kernels.choose_kernels(monkeypatch)
    for got, want in zip(run_all(), expected, strict=True):
        assert relative_error(got, want) <= TOLERANCE[torch.float32]
    shown = layer.explain(x)
    assert shown.convolution == ("fla", ("causal-conv1d is not installed",))
    assert shown.norm == ("triton", ())
    assert shown.rule.chosen == "torch"
    with torch.no_grad():
        step = layer.explain(x[:, :3], cache=layer.make_cache(1))
    assert step.rule.problem.pool is not None
    assert step.convolution.reasons[-1] == "fla takes one token and a contiguous cache"
    assert all(f"\n{part}" in f"\n{step}" for part in ("convolution", "delta rule", "gated norm"))


def test_explain_says_why_pytorch_runs_a_part() -> None:
    x = torch.randn(2, 9, 16)
    layer = make_layer("cpu")
    before = layer.make_cache(2)
    shown = layer.explain(x, cache=before)
    assert "kernels need a GPU, the tensors are on cpu" in str(shown.convolution)
    assert "kernels need a GPU" in str(shown.norm)
    assert not before.conv.any()
    assert not before.state.any()
    assert shown.rule.chosen == "torch"
    assert shown.rule.problem.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.explain(x).rule.problem.dtype == torch.bfloat16
