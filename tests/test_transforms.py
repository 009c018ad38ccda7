"""Transforms of functions and traced programs: what the op does not support is refused by name, and
no gradient is lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdn
from gdn.testing import Case, make_inputs
from gdn.testing.decode import StepCase, make_step

# PyTorch's own, of torch.jit
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
DENSE = Case("dense", T=5, K=4, V=4, HV=4)
STEP = StepCase("step", B=2, K=4, V=4, HV=4)


def dense(device: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """v, and a scalar function of it."""
    inputs = make_inputs(DENSE, device)
    v = inputs.pop("v")
    return v, lambda v: gdn.gated_delta_net(**inputs, v=v).o.square().sum()


def step(device: str, name: str = "v") -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """An argument of a decode step, and a scalar function of it."""
    inputs = make_step(STEP, device)
    x = inputs.pop(name)
    return x, lambda x: gdn.gated_delta_net_decode(**inputs | {name: x}).sum()


REVERSE: dict[str, Callable[[Any, Tensor], object]] = {
    "grad": lambda f, v: torch.func.grad(f)(v),
    "vjp": lambda f, v: torch.func.vjp(f, v),
    "jacrev": lambda f, v: torch.func.jacrev(f)(v),
    "hessian": lambda f, v: torch.func.hessian(f)(v),
}
FORWARD: dict[str, Callable[[Any, Tensor], object]] = {
    "jvp": lambda f, v: torch.func.jvp(f, (v,), (v,)),
    "jacfwd": lambda f, v: torch.func.jacfwd(f)(v),
    "linearize": lambda f, v: torch.func.linearize(f, v),
}


@pytest.mark.parametrize("name", REVERSE)
def test_reverse_transforms_are_refused(device: str, name: str) -> None:
    v, function = dense(device)
    with pytest.raises(
        RuntimeError, match=r"does not support the transforms of torch.func.*vjp; use"
    ):
        REVERSE[name](function, v)
    v, function = step(device)
    with pytest.raises(RuntimeError, match=r"decode is not differentiable"):
        REVERSE[name](function, v)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_transforms_are_refused(device: str, name: str) -> None:
    v, function = dense(device)
    with pytest.raises(RuntimeError, match="no forward-mode derivative, and v has a tangent"):
        FORWARD[name](function, v)
    for argument in ("v", "g", "state"):
        x, function = step(device, argument)
        with pytest.raises(RuntimeError, match=f"forward-mode .*, and {argument} has a tangent"):
            FORWARD[name](function, x)


def test_dual_levels_without_a_tangent_are_no_obstacle(device: str) -> None:
    v, function = dense(device)
    expected = function(v)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(function(v), expected)
        with pytest.raises(RuntimeError, match="v has a tangent"):
            function(torch.autograd.forward_ad.make_dual(v, v))


def test_vmap_is_refused(device: str) -> None:
    for v, function in (dense(device), step(device)):
        with pytest.raises(RuntimeError, match=r"does not support torch.func.vmap; fold"):
            torch.func.vmap(function)(torch.stack([v, v]))


def test_functions_without_the_op_inside_a_transform_are_free(device: str) -> None:
    """`functional_call` and Jacobians by autograd work."""
    v, function = dense(device)
    jacobian = torch.autograd.functional.jacobian(function, v)
    leaf = v.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(jacobian, expected)


class Scaled(nn.Module):
    """The op with a weight on v."""

    def __init__(self, device: str) -> None:
        super().__init__()
        inputs = make_inputs(DENSE, device)
        self.inputs = {name: x for name, x in inputs.items() if name != "v"}
        self.weight = nn.Parameter(torch.ones(4, device=device))

    def forward(self, v: Tensor) -> Tensor:
        return gdn.gated_delta_net(**self.inputs, v=v * self.weight).o


PROGRAMS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]] = {
    "jit": lambda module, v: torch.jit.trace(module, (v,), check_trace=False),
    "export": lambda module, v: torch.export.export(module, (v,)).module(),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_traced_without_gradients_refuse_them(device: str, kind: str) -> None:
    module, v = Scaled(device), make_inputs(DENSE, device)["v"]
    expected = module(v)
    with torch.no_grad():
        program = PROGRAMS[kind](module, v)
        assert torch.equal(program(v), expected)
    with pytest.raises(RuntimeError, match="traced or exported without gradients"):
        program(v)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_traced_with_gradients_give_them(device: str, kind: str) -> None:
    module, v = Scaled(device), make_inputs(DENSE, device)["v"]
    program = PROGRAMS[kind](module, v)
    with torch.no_grad():
        assert torch.equal(program(v), module(v))
    x, y = v.clone().requires_grad_(), v.clone().requires_grad_()
    program(x).square().sum().backward()
    module(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
