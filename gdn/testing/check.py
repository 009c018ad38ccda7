"""Checks of a backend against the definition: of single cases, and of all with `check_backend`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gdn
from gdn import registry
from gdn.backend import Backend, Capabilities
from gdn.backend import reasons_against as reasons_of

from .cases import CASES, TOLERANCE, Case
from .decode import STEPS, StepCase, make_step, run_step_definition
from .inputs import (
    gradients,
    make_inputs,
    make_output_gradients,
    relative_error,
    run_definition,
    with_gradients,
)
from .prefill import PREFILLS, PrefillCase, make_prefill, run_prefill_definition


class Checked(NamedTuple):
    """What `check_backend` found: the number of cases that agree with the definition, and of cases
    that the backend refuses because it does not claim them."""

    agreed: int
    refused: int


def run(backend: str, case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """o, final_state if output_final_state and, if the inputs require grad, every gradient, by
    name."""
    outputs = gdn.gated_delta_net(**inputs, backend=backend)
    return _named(case, outputs, inputs)


@functools.cache
def truth(case: Case, final: bool = True) -> dict[str, Tensor]:
    """The same tensors by the definition, in float64 on the CPU, from inputs rounded to the case's
    dtype."""
    inputs = with_gradients(make_inputs(case), torch.float64)
    o, state = run_definition(inputs)
    return _named(case, (o, state if final else None), inputs)


def _named(
    case: Case, outputs: tuple[Tensor, Tensor | None], inputs: dict[str, Any]
) -> dict[str, Tensor]:
    wanted = {n: x for n, x in zip(("o", "final_state"), outputs, strict=True) if x is not None}
    found = {}
    if inputs["q"].requires_grad:
        into = make_output_gradients(case, outputs[0].device)[: len(wanted)]
        found = gradients(tuple(wanted.values()), inputs, into)
    return {name: x.detach() for name, x in wanted.items()} | found


def assert_close(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """AssertionError unless they agree within the tolerance of dtype, elementwise and in relative
    RMS."""
    torch.testing.assert_close(
        got.double().cpu(),
        expected.double().cpu(),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
        msg=lambda text: f"{name}: {text}",
    )
    error = relative_error(got, expected)
    assert error <= TOLERANCE[dtype], f"{name}: relative RMS error {error:.2e}"


def reasons_against(backend: str, inputs: dict[str, Any], prefill: bool = False) -> tuple[str, ...]:
    """The reasons why a backend does not claim this call, or with state= this step, or this prefill
    on a pool; empty if it does."""
    found = gdn.explain(**inputs, prefill=prefill, backend=backend)
    verdicts = {v.name: v for v in found.verdicts}
    return verdicts[backend].reasons


def assert_refused(
    backend: str, inputs: dict[str, Any], reasons: tuple[str, ...], prefill: bool = False
) -> None:
    """AssertionError unless the call, or with state= the step, or the prefill on a pool, raises
    BackendUnsupportedError with these reasons and leaves the states as they are."""
    op: Any = gdn.gated_delta_net_decode if "state" in inputs else gdn.gated_delta_net
    op = gdn.gated_delta_net_prefill if prefill else op
    before = inputs["state"].clone() if "state" in inputs else None
    try:
        op(**inputs, backend=backend)
    except gdn.BackendUnsupportedError as error:
        refusal = error
    else:
        raise AssertionError(f"{backend} runs what it does not claim: {'; '.join(reasons)}")
    assert refusal.reasons == {backend: list(reasons)}
    assert all(reason in str(refusal) for reason in reasons)
    if before is not None:
        assert torch.equal(before.nan_to_num(7), inputs["state"].nan_to_num(7))


def assert_agrees(backend: str, case: Case, inputs: dict[str, Any]) -> None:
    """AssertionError unless outputs and gradients of a case have the shapes and dtypes of the
    contract and agree with the definition."""
    got = run(backend, case, inputs)
    expected = truth(case, "final_state" in got)
    for name, value in got.items():
        like = inputs["v"] if name == "o" else inputs.get(name)
        exact = torch.float64 if case.dtype == torch.float64 else torch.float32
        dtype = exact if like is None or name == "final_state" else like.dtype
        assert value.shape == expected[name].shape, f"{name} has shape {tuple(value.shape)}"
        assert value.dtype == dtype, f"{name} must be {dtype}, got {value.dtype}"
        assert_close(name, value, expected[name], case.dtype)


def assert_step_agrees(backend: str, case: StepCase, inputs: dict[str, Any]) -> None:
    """AssertionError unless o and the written slots agree with the definition and all other slots
    keep their bits."""
    plain = _on_cpu(inputs)
    written = inputs["state"] if case.output == "none" else inputs["output_states"]
    before = written.cpu().clone()
    expected_o, expected = run_step_definition(plain)
    o = gdn.gated_delta_net_decode(**inputs, backend=backend)
    assert_o_agrees(case, inputs, o, expected_o)
    precision = torch.float64 if case.dtype == torch.float64 else case.pool
    assert_states_agree("state", before, written.cpu(), expected, precision)
    if case.output != "none":
        read = (x.cpu().nan_to_num(7) for x in (inputs["state"], plain["state"]))
        assert torch.equal(*read), "state changed beside output_states"


def assert_prefill_agrees(backend: str, case: PrefillCase, inputs: dict[str, Any]) -> None:
    """AssertionError unless o, the written slots and the checkpoints agree with the definition and
    all else keeps its bits."""
    plain = _on_cpu(inputs)
    expected_o, expected, buffer = run_prefill_definition(plain)
    o = gdn.gated_delta_net_prefill(**inputs, backend=backend)
    assert_o_agrees(case, inputs, o, expected_o)
    exact = torch.float64 if case.dtype == torch.float64 else case.pool
    precision = max(exact, case.dtype, key=TOLERANCE.__getitem__)
    assert_states_agree("state", plain["state"], inputs["state"].cpu(), expected, precision)
    if buffer is not None:
        before, after = plain["checkpoints"].flatten(0, -4), inputs["checkpoints"].flatten(0, -4)
        assert_states_agree("checkpoints", before, after.cpu(), buffer.flatten(0, -4), precision)


def _on_cpu(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies of the tensors on the CPU."""
    return {n: x.cpu().clone() if isinstance(x, Tensor) else x for n, x in inputs.items()}


def assert_o_agrees(
    case: StepCase | PrefillCase, inputs: dict[str, Any], o: Tensor, expected: Tensor
) -> None:
    """AssertionError unless o, or `out`, agrees up to the end of the last sequence, and holds zeros
    after it, or `out` the NaN that it held before."""
    assert o.dtype == case.dtype, f"o must be {case.dtype}, got {o.dtype}"
    assert not case.out or o is inputs["out"], "o must be out"
    end = o.shape[1] - case.tail
    assert_close("o", o[:, :end], expected[:, :end], case.dtype)
    tail = o[:, end:]
    untouched = tail.isnan().all() if case.out else not tail.any()
    assert untouched, "o is not zero past the last sequence, or out not untouched"


def assert_states_agree(
    name: str, before: Tensor, after: Tensor, expected: Tensor, dtype: torch.dtype
) -> None:
    """AssertionError unless the states [N, ...] that change by the definition agree with it and all
    others keep their bits, NaN included."""
    kept = (before.double() == expected) | (before.isnan() & expected.isnan())
    written = ~kept.flatten(1).all(1)
    still = torch.equal(after[~written].nan_to_num(7), before[~written].nan_to_num(7))
    assert still, f"{name}: a slot changed that is not named"
    assert_close(name, after[written], expected[written], dtype)


@contextmanager
def _registered(backend: Backend | str) -> Iterator[str]:
    """The name of a backend. If it is not registered, it is for the time of the block."""
    if isinstance(backend, str):
        yield registry.find_backend(backend).name
        return
    known = registry._backends.get(backend.name)
    if known is backend:
        yield backend.name
        return
    gdn.register_backend(backend, replace=True)
    try:
        yield backend.name
    finally:
        gdn.unregister_backend(backend.name)
        if known is not None:
            gdn.register_backend(known, replace=True)


def check_backend(backend: Backend | str, device: torch.device | str | None = None) -> Checked:
    """Check a backend against the float64 definition on every shared case, in its own test suite.

    A case that the backend claims must agree with the definition: o, the final state, every
    gradient, decode steps, prefills on a pool and their pools, within `gdn.testing.TOLERANCE`, in
    each dtype that it claims, with the shapes and dtypes of the contract. A case that it does not
    claim must be refused with every reason. A backend that does not claim `resets` is not run on
    the cases with such gates; these do not count.

    Args:
        backend: a Backend, registered or not, or a registered name.
        device: where to run. None means a GPU if there is one and the backend can use it, else the
            CPU.

    Returns:
        Checked(agreed, refused): the numbers of cases.

    Raises:
        AssertionError: a claimed case disagrees, or an unclaimed one runs. The message names it.
        UnknownBackendError: no backend has this name.
    """
    with _registered(backend) as name:
        able = registry.find_backend(name).capabilities
        if device is None:
            on_gpu = torch.cuda.is_available() and (not able.devices or "cuda" in able.devices)
            device = "cuda" if on_gpu else "cpu"
        agreed = refused = 0
        for dtype in TOLERANCE:
            for case in (*CASES, *STEPS, *PREFILLS):
                case = replace(case, dtype=dtype)
                try:
                    claimed = _check_case(name, case, device, able)
                except Exception as error:
                    which = f"{case.name}, {str(dtype).removeprefix('torch.')}"
                    raise AssertionError(f"{name} on case {which}: {error}") from error
                agreed += claimed is True
                refused += claimed is False
        return Checked(agreed, refused)


def _ask_all(backend: str, inputs: dict[str, Any], prefill: bool) -> None:
    """Let the backend's exceptions through, which dispatch takes for reasons."""
    found, problem = registry.find_backend(backend), gdn.explain(**inputs, prefill=prefill).problem
    found.unavailable()
    if not reasons_of(found.capabilities, problem):
        found.unsupported(problem)
        found.path(problem)


def _check_case(
    backend: str, case: Case, device: torch.device | str, able: Capabilities
) -> bool | None:
    """Check one case. Return whether the backend claims it; None if it was not run."""
    prefill = isinstance(case, PrefillCase)
    if isinstance(case, StepCase):
        inputs = make_step(case, device)
    elif isinstance(case, PrefillCase):
        inputs = make_prefill(case, device)
    else:
        inputs = make_inputs(case, device)
        inputs["output_final_state"] = "output_final_state" in able.flags
        if able.backward:
            inputs = with_gradients(inputs)
    reasons = reasons_against(backend, inputs, prefill)
    _ask_all(backend, inputs, prefill)
    if reasons:
        assert_refused(backend, inputs, reasons, prefill)
        return False
    if isinstance(case, StepCase):
        assert_step_agrees(backend, case, inputs)
    elif isinstance(case, PrefillCase):
        assert_prefill_agrees(backend, case, inputs)
    elif case.needs_resets and not able.resets:
        return None
    else:
        assert_agrees(backend, case, inputs)
    return True
