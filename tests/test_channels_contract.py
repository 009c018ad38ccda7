"""A decay per channel, no decay, and a lower bound of the fused gate: the definition, the checks of
arguments, and Kimi Delta Attention's names. No backend is compared here."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gdn
from gdn.backend import Capabilities, Forward, Plan
from gdn.definition import gated_delta_rule, log_decay
from gdn.problem import Call
from gdn.testing import Case, make_inputs, run_definition
from gdn.testing.decode import StepCase, make_step

DENSE = Case("channels", T=5, B=2, HV=4, K=8, V=16)
STEP = StepCase("step", B=2, T=2, HV=4, K=8, V=16, slots="own")
GATE = {"use_gate_in_kernel": True, "A_log": torch.zeros(4)}


def channels(inputs: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The inputs with a gate of their own for each channel."""
    shape = *inputs["v"].shape[:3], inputs["q"].shape[3]
    g = -torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return inputs | {"g": g}


class Defined(gdn.Backend):
    """The definition in float32, with every option."""

    name = "defined"
    summary = "the definition"
    capabilities = Capabilities(
        dtypes=(torch.float32,),
        gva=True,
        initial_state=True,
        per_channel=True,
        gate_lower_bound=True,
        flags=frozenset({"output_final_state", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"}),
    )

    def plan(self, call: Any) -> Plan:
        return DefinedPlan()


class Plain(Defined):
    """Without a decay per channel."""

    name = "plain"
    capabilities = replace(Defined.capabilities, per_channel=False, gate_lower_bound=False)


class DefinedPlan(Plan):
    """Records the calls that reach it."""

    seen: list[Call] = []  # noqa: RUF012

    def forward(self, call: Call, save: bool) -> Forward:
        self.seen.append(call)
        o, state = gated_delta_rule(call, torch.float32)
        return Forward(o, state if call.output_final_state else None, [])


@pytest.fixture
def defined(clean_registry: None) -> str:
    gdn.register_backend(Defined())
    return Defined.name


def test_each_channel_decays_by_itself() -> None:
    """Channels that no key touches keep their own share of the initial state."""
    inputs = channels(make_inputs(DENSE))
    inputs["k"][..., 3:] = 0
    _, state = run_definition(inputs)
    expected = inputs["g"].double().sum(1).exp()[..., None] * inputs["initial_state"].double()
    torch.testing.assert_close(state[:, :, 3:], expected[:, :, 3:])
    assert not torch.allclose(state[:, :, :3], expected[:, :, :3])


def test_equal_channels_are_one_decay_per_head() -> None:
    inputs = make_inputs(DENSE)
    expected = run_definition(inputs)
    got = run_definition(inputs | {"g": inputs["g"][..., None].expand(-1, -1, -1, 8)})
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 4, 8)])
def test_the_fused_gates_equal_the_textbook_formulas(shape: tuple[int, ...]) -> None:
    x, A_log, dt_bias = torch.randn(shape), torch.randn(4), torch.randn(shape[2:])
    A = A_log.exp().view(4, *[1] * (len(shape) - 3))
    torch.testing.assert_close(log_decay(x, A_log, dt_bias), -A * F.softplus(x + dt_bias))
    bounded = log_decay(x, A_log, dt_bias, -5.0)
    torch.testing.assert_close(bounded, -5 * torch.sigmoid(A * (x + dt_bias)))
    torch.testing.assert_close(log_decay(x, None, None, -3.0), -3 * torch.sigmoid(x))
    far = log_decay(torch.tensor([[[-torch.inf, torch.inf]]]), torch.full((2,), 100.0), None, -5.0)
    assert far.tolist() == [[[0.0, -5.0]]]


def test_no_gate_is_no_decay(defined: str) -> None:
    """Under the op, in decode, in `explain` and in `warmup`."""
    inputs = make_inputs(DENSE)
    zero = gdn.gated_delta_net(**inputs | {"g": torch.zeros(2, 5, 4)}, backend="torch")
    none = gdn.gated_delta_net(**inputs | {"g": None}, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(none, zero, strict=True))
    leaf = inputs["k"].clone().requires_grad_()
    gdn.gated_delta_net(**inputs | {"g": None, "k": leaf}, backend="torch").o.sum().backward()
    assert leaf.grad.any()
    step = make_step(STEP)
    before = step["state"].clone()
    o = gdn.gated_delta_net_decode(**step | {"g": None}, backend="torch")
    after = step["state"].clone()
    step["state"].copy_(before)
    zeros = step | {"g": torch.zeros(2, 2, 4)}
    assert torch.equal(gdn.gated_delta_net_decode(**zeros, backend="torch"), o)
    assert torch.equal(step["state"], after)
    assert gdn.explain(**inputs | {"g": None}).chosen == "torch"
    assert gdn.warmup(**inputs | {"g": None}, backend="torch") == "torch"
    double = {n: x.double() if torch.is_tensor(x) else x for n, x in inputs.items()}
    assert gdn.gated_delta_net(**double | {"g": None}).o.dtype == torch.float64


BAD = {
    "channels": ({"g": torch.zeros(2, 5, 4, 7)}, "g must be [B, T, HV, K] = (2, 5, 4, 8)", "less"),
    "neither": ({"g": torch.zeros(2, 5, 2)}, "g must be [B, T, HV] = (2, 5, 4)", "per channel"),
    "none-fused": (GATE | {"g": None}, "g must be given with use_gate_in_kernel=True, got None"),
    "bias": (GATE | {"dt_bias": torch.zeros(4)}, "dt_bias must be [HV, K] = (4, 8), got (4,)"),
    "flat": (GATE | {"dt_bias": torch.zeros(31)}, "dt_bias must be [HV, K] = (4, 8), got (31,)"),
    "bound-alone": ({"gate_lower_bound": -5.0}, "gate_lower_bound must come with use_gate_in"),
    "bound-zero": (GATE | {"gate_lower_bound": 0.0}, "finite and below 0, got 0.0", "-5"),
    "bound-infinite": (GATE | {"gate_lower_bound": -torch.inf}, "finite and below 0, got -inf"),
    "no-A": ({"use_gate_in_kernel": True}, "A_log must be given"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_is_refused_with_argument_requirement_got_and_remedy(name: str) -> None:
    changes, *words = BAD[name]
    inputs = channels(make_inputs(DENSE)) | changes
    texts = []
    for function in (gdn.gated_delta_net, gdn.explain, gdn.warmup):
        with pytest.raises(ValueError) as error:  # noqa: PT011  the words are the match
            function(**inputs)
        texts.append(str(error.value))
    assert all(word in texts[0] for word in (*words, "got")), texts[0]
    assert texts[0] == texts[1] == texts[2]


def test_wrong_types_are_type_errors() -> None:
    inputs = channels(make_inputs(DENSE))
    with pytest.raises(TypeError, match="gate_lower_bound must be a number, got str '-5'"):
        gdn.gated_delta_net(**inputs | GATE, gate_lower_bound="-5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"g must be a torch.Tensor, got float; or None for no"):
        gdn.gated_delta_net(**inputs | {"g": 1.0})
    calls: tuple[tuple[Any, dict[str, Any]], ...] = (
        (gdn.kimi_delta_attention, make_inputs(DENSE)),
        (gdn.kimi_delta_attention_decode, make_step(STEP)),
    )
    for function, given in calls:
        for g, got in ((given["g"], r"\(2, ., 4\)"), (None, "NoneType")):
            with pytest.raises(ValueError, match=rf"g must be \[B, T, HV, K\].*got {got}"):
                function(**given | {"g": g})


def test_safe_gate_needs_a_bound_where_the_gate_is_fused(defined: str) -> None:
    inputs = channels(make_inputs(DENSE)) | {"backend": defined}
    with pytest.raises(ValueError, match="lower_bound must be given with safe_gate=True"):
        gdn.kimi_delta_attention(**inputs | GATE, safe_gate=True)
    plain = gdn.kimi_delta_attention(**inputs)
    assert torch.equal(gdn.kimi_delta_attention(**inputs, safe_gate=True).o, plain.o)
    bounded = gdn.kimi_delta_attention(**inputs | GATE, lower_bound=-5.0)
    safe = gdn.kimi_delta_attention(**inputs | GATE, lower_bound=-5, safe_gate=True)
    assert torch.equal(safe.o, bounded.o)


def test_kimis_names_reach_the_same_call(defined: str) -> None:
    """Every keyword, a flat dt_bias, and an A_log that is left out."""
    kimi = inspect.signature(gdn.kimi_delta_attention).parameters
    plain = inspect.signature(gdn.gated_delta_net).parameters
    only = {"lower_bound", "safe_gate"}, {"gate_lower_bound", "chunk_indices"}
    assert set(kimi) - only[0] == set(plain) - only[1]
    steps = gdn.kimi_delta_attention_decode, gdn.gated_delta_net_decode
    names = [set(inspect.signature(step).parameters) for step in steps]
    assert names[0] - {"lower_bound"} == names[1] - {"gate_lower_bound"}
    inputs = channels(make_inputs(DENSE)) | {"use_gate_in_kernel": True, "backend": defined}
    flat = torch.randn(32)
    got = gdn.kimi_delta_attention(**inputs, lower_bound=-5.0, dt_bias=flat)
    seen = DefinedPlan.seen[-1]
    assert (seen.gate_lower_bound, seen.A_log, seen.per_channel) == (-5.0, None, True)
    assert torch.equal(seen.dt_bias, flat.view(4, 8))
    shaped = {"dt_bias": flat.view(4, 8), "A_log": torch.zeros(4)}
    expected = gdn.gated_delta_net(**inputs, gate_lower_bound=-5.0, **shaped)
    torch.testing.assert_close(got, expected)


def test_explain_names_the_backends_with_channels(defined: str) -> None:
    gdn.register_backend(Plain())
    inputs = channels(make_inputs(DENSE))
    for given, word in ((inputs, "per channel"), (inputs | GATE, "gate_lower_bound")):
        bound = {"gate_lower_bound": -5.0} if word == "gate_lower_bound" else {}
        found = gdn.explain(**given, **bound, backend=defined)
        assert found.chosen == defined
        assert "per_channel" in str(found.problem)
        assert ("gate_lower_bound=-5" in str(found.problem)) == bool(bound)
        reasons = {verdict.name: "; ".join(verdict.reasons) for verdict in found.verdicts}
        assert word in reasons[Plain.name]
