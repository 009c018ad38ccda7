"""Edge cases: no tokens, no batch, absent options, states of other dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import require

import gdn
from gdn.testing import Case, gradients, make_inputs, make_output_gradients, with_gradients

EMPTY = (
    Case("no-tokens", T=0, B=2, HV=4),
    Case("no-batch", T=5, B=0, HV=4),
    Case("no-tokens-v-first", T=0, B=2, HV=4, K=32, state_v_first=True),
    Case("no-tokens-zero-state", T=0, B=2, initial_state=False),
    Case("nothing-packed", lengths=()),
    Case("empty-sequences", lengths=(0, 0, 0), state_v_first=True),
    Case("no-tokens-fused", T=0, B=2, fused=True),
)


@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.name)
def test_no_tokens_pass_the_state_through(
    backend: str, device: str, case: Case, dtype: torch.dtype
) -> None:
    case = replace(case, dtype=dtype)
    inputs = with_gradients(make_inputs(case, device))
    require(backend, inputs)
    o, state = gdn.gated_delta_net(**inputs, backend=backend)
    assert o.shape == (case.B, case.tokens, case.HV, case.V)
    initial = inputs.get("initial_state")
    expected = torch.zeros_like(state) if initial is None else initial
    assert torch.equal(state, expected)
    do, dS = make_output_gradients(case, device)
    found = gradients((o, state), inputs, (do, dS))
    if initial is not None:
        assert torch.equal(found.pop("initial_state"), dS)
    assert all(x.shape == inputs[name].shape and not x.any() for name, x in found.items())


def test_final_state_only_when_asked_for(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case("state", T=70, dtype=dtype), device)
    require(backend, inputs)
    assert gdn.gated_delta_net(**inputs, backend=backend).final_state is not None
    inputs["output_final_state"] = False
    o, state = gdn.gated_delta_net(**with_gradients(inputs), backend=backend)
    assert state is None
    o.sum().backward()  # differentiable without the state


def test_states_of_other_dtypes_come_back_in_float32(backend: str, device: str) -> None:
    inputs = make_inputs(Case("state", T=70, dtype=torch.bfloat16), device)
    inputs["initial_state"] = inputs["initial_state"].bfloat16().requires_grad_()
    for name in ("g", "beta"):
        inputs[name] = inputs[name].bfloat16().requires_grad_()
    require(backend, inputs)
    o, state = gdn.gated_delta_net(**inputs, backend=backend)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    (o.sum() + state.sum()).backward()
    for name in ("initial_state", "g", "beta"):
        assert inputs[name].grad.dtype == torch.bfloat16


def test_scale_defaults_to_the_root_of_K(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case("scale", T=70, K=32, dtype=dtype), device)
    require(backend, inputs)
    plain = gdn.gated_delta_net(**inputs, backend=backend).o
    given = gdn.gated_delta_net(**inputs, scale=32**-0.5, backend=backend).o
    doubled = gdn.gated_delta_net(**inputs, scale=2 * 32**-0.5, backend=backend).o
    assert torch.equal(plain, given)
    torch.testing.assert_close(2 * plain, doubled)
    assert not gdn.gated_delta_net(**inputs, scale=0.0, backend=backend).o.any()


def test_dt_bias_may_be_left_out(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case("bias", T=70, fused=True, dtype=dtype), device)
    require(backend, inputs)
    zero = gdn.gated_delta_net(
        **inputs | {"dt_bias": torch.zeros_like(inputs["dt_bias"])}, backend=backend
    )
    inputs = with_gradients(inputs | {"dt_bias": None})
    none = gdn.gated_delta_net(**inputs, backend=backend)
    torch.testing.assert_close(none.o, zero.o)
    none.o.sum().backward()
    assert inputs["A_log"].grad.isfinite().all()
