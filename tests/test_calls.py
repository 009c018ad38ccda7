"""One place for an option: what follows from the fields of `Call` and `Step`, and the signatures
that offer them."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import pytest
import torch

import gdn
from gdn import ops, pool_ops
from gdn.backend import Gradients
from gdn.calls import Options
from gdn.problem import (
    CALL_TENSORS,
    DIFFERENTIABLE,
    FLAGS,
    POOL_TENSORS,
    Call,
    Prefill,
    Step,
    argument_types,
)
from gdn.testing import Case, make_inputs
from gdn.testing.decode import StepCase, make_step
from gdn.testing.prefill import PrefillCase, make_prefill

OPS = (gdn.gated_delta_net, gdn.gated_delta_net_decode, gdn.gated_delta_net_prefill)


def keywords(function: Any) -> dict[str, Any]:
    """The keyword-only parameters of a function but backend, with their types."""
    kinds = inspect.signature(function).parameters.values()
    names = [p.name for p in kinds if p.kind is p.KEYWORD_ONLY and p.name != "backend"]
    return {name: get_type_hints(function)[name] for name in names}


def test_explain_and_warmup_take_the_keywords_of_all_ops() -> None:
    every = keywords(OPS[2]) | keywords(OPS[1]) | keywords(OPS[0])
    assert get_type_hints(Options) == every
    own: set[str]
    for function, own in (
        (gdn.explain, {"backend", "prefill"}),
        (gdn.warmup, {"backend", "backward", "sm", "prefill"}),
    ):
        parameters = inspect.signature(function).parameters
        assert set(parameters) - {"q", "k", "v", "g", "beta"} == set(every) | own


def test_the_schemas_name_every_field() -> None:
    ops_by_kind = {
        Call: torch.ops.gdn.forward, Step: torch.ops.gdn.decode, Prefill: torch.ops.gdn.prefill,
    }  # fmt: skip
    for kind, op in ops_by_kind.items():
        names = [argument.name for argument in op.default._schema.arguments]
        assert names[: len(argument_types(kind))] == list(argument_types(kind))
    assert Gradients._fields == DIFFERENTIABLE
    numbers, modes = ("scale", "gate_lower_bound"), ("batch_invariant", "context_parallel")
    assert Call._fields[CALL_TENSORS:] == (*numbers, *FLAGS, *modes)
    assert Step._fields[POOL_TENSORS[Step] :] == ("null_index", "leading_column")
    assert Prefill._fields[POOL_TENSORS[Prefill] :] == ("null_index",)


def test_ops_declare_what_they_write_to() -> None:
    for op, written in (
        (torch.ops.gdn.decode, {"state", "out", "output_states"}),
        (torch.ops.gdn.prefill, {"state", "out", "checkpoints"}),
    ):
        arguments = op.default._schema.arguments
        assert {x.name for x in arguments if x.alias_info and x.alias_info.is_write} == written


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_reaches_its_field(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """The public functions hand their arguments over by position."""
    seen: list[Call] = []

    def run_forward(call: Call, *_: object) -> tuple[torch.Tensor, None]:
        seen.append(call)
        return torch.zeros(0), None

    monkeypatch.setattr(ops, "run_forward", run_forward)
    monkeypatch.setattr(pool_ops, "run", lambda given, _: seen.append(given.call))
    cases: list[tuple[Any, dict[str, Any]]] = [
        (OPS[0], make_inputs(Case("call", T=1))),
        (OPS[1], make_step(StepCase("step", B=1))),
        (OPS[2], make_prefill(PrefillCase("prefill", B=1, T=1))),
    ]
    for function, inputs in cases:
        tensors = {n: x for n, x in inputs.items() if torch.is_tensor(x)}
        if flag in keywords(function):
            function(**tensors, **{flag: True})
            call = seen.pop()
            assert [name for name in FLAGS if getattr(call, name)] == [flag]
            given = {n: x for n, x in call._asdict().items() if torch.is_tensor(x)}
            assert all(given[n] is x for n, x in tensors.items() if n in Call._fields)
