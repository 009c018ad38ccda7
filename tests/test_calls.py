"""One place for an option: what follows from the fields of `Call` and `Step`, and the signatures
that offer them."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import pytest
import torch

import gdn
from gdn import ops
from gdn.backend import Gradients
from gdn.calls import Options
from gdn.problem import CALL_TENSORS, DIFFERENTIABLE, FLAGS, Call, Step, argument_types
from gdn.testing import Case, make_inputs
from gdn.testing.decode import StepCase, make_step

OPS = (gdn.gated_delta_net, gdn.gated_delta_net_decode)


def keywords(function: Any) -> dict[str, Any]:
    """The keyword-only parameters of a function but backend, with their types."""
    kinds = inspect.signature(function).parameters.values()
    names = [p.name for p in kinds if p.kind is p.KEYWORD_ONLY and p.name != "backend"]
    return {name: get_type_hints(function)[name] for name in names}


def test_explain_and_warmup_take_the_keywords_of_both_ops() -> None:
    both = keywords(OPS[1]) | keywords(OPS[0])
    assert get_type_hints(Options) == both
    for function, own in ((gdn.explain, {"backend"}), (gdn.warmup, {"backend", "backward", "sm"})):
        parameters = inspect.signature(function).parameters
        assert set(parameters) - {"q", "k", "v", "g", "beta"} == set(both) | own


def test_the_schemas_name_every_field() -> None:
    for kind, op in ((Call, torch.ops.gdn.forward), (Step, torch.ops.gdn.decode)):
        names = [argument.name for argument in op.default._schema.arguments]
        assert names[: len(argument_types(kind))] == list(argument_types(kind))
    assert Gradients._fields == DIFFERENTIABLE
    assert Call._fields[CALL_TENSORS:] == ("scale", "gate_lower_bound", *FLAGS)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_reaches_its_field(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """The public functions hand their arguments over by position."""
    seen: list[Call] = []

    def run_forward(call: Call, *_: object) -> tuple[torch.Tensor, None]:
        seen.append(call)
        return torch.zeros(0), None

    monkeypatch.setattr(ops, "run_forward", run_forward)
    monkeypatch.setattr(ops, "run_decode", lambda step, _: seen.append(step.call))
    cases: list[tuple[Any, dict[str, Any]]] = [
        (OPS[0], make_inputs(Case("call", T=1))),
        (OPS[1], make_step(StepCase("step", B=1))),
    ]
    for function, inputs in cases:
        tensors = {n: x for n, x in inputs.items() if torch.is_tensor(x)}
        if flag in keywords(function):
            function(**tensors, **{flag: True})
            call = seen.pop()
            assert [name for name in FLAGS if getattr(call, name)] == [flag]
            given = {n: x for n, x in call._asdict().items() if torch.is_tensor(x)}
            assert all(given[n] is x for n, x in tensors.items() if n in Call._fields)
