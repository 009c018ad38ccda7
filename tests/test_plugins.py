"""Backends of other packages: their faults are contained and named, and `auto` goes on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from marker import INPUTS, Marker, MarkerPlan, which_ran

import gdn
from gdn import registry
from gdn.backend import Backend, Forward, Gradients, Plan
from gdn.problem import Call, PoolCall, Problem, Step
from gdn.testing import check_backend, with_gradients
from gdn.testing.decode import StepCase, make_step

pytestmark = pytest.mark.usefixtures("clean_registry")


class Raises(Marker):
    """First in "auto"; one of its methods raises."""

    priority = 1000

    def __init__(self, method: str, error: type[Exception] = ZeroDivisionError) -> None:
        super().__init__(f"raises_{method}", 7)
        self.method, self.error = method, error

    def _answer(self, method: str) -> None:
        if self.method == method:
            raise self.error("so sorry")

    def unavailable(self) -> str | None:
        self._answer("unavailable")
        return None

    def unsupported(self, problem: Problem) -> list[str]:
        self._answer("unsupported")
        return []

    def path(self, problem: Problem) -> str:
        self._answer("path")
        return "path"


@pytest.mark.parametrize("method", ["unavailable", "unsupported"])
def test_a_check_that_raises_is_a_reason(method: str) -> None:
    reason = rf"its {method}\(\) raises ZeroDivisionError: so sorry"
    gdn.register_backend(Raises(method))
    assert gdn.gated_delta_net(**INPUTS).o.shape == INPUTS["v"].shape
    assert gdn.explain(**INPUTS).chosen == "torch"
    with pytest.raises(gdn.BackendUnsupportedError, match=reason):
        which_ran(backend=f"raises_{method}")
    with pytest.raises(AssertionError, match="so sorry"):
        check_backend(Raises(method), "cpu")
    info = next(x for x in gdn.list_backends() if x.name == f"raises_{method}")
    assert info.available == (method != "unavailable")


def test_a_path_that_raises_stops_no_call() -> None:
    gdn.register_backend(Raises("path"))
    assert which_ran() == 7
    assert "unknown, its path() raises ZeroDivisionError: so sorry" in str(gdn.explain(**INPUTS))
    with pytest.raises(AssertionError, match="so sorry"):
        check_backend(Raises("path"), "cpu")


@pytest.mark.parametrize("package", ["no_such_package", "no_such_parent.child", "torch.no.child"])
def test_a_missing_package_is_a_reason(package: str) -> None:
    gdn.register_backend(Marker("lacking", packages=("torch", package)))
    row = next(info for info in gdn.list_backends() if info.name == "lacking")
    assert (row.available, row.reason) == (False, f"not installed: {package}")
    with pytest.raises(gdn.BackendUnsupportedError, match=f"not installed: {package}"):
        which_ran(backend="lacking")


class NoCapabilities(Backend):
    name = "without"
    summary = "forgot something"

    def plan(self, call: Call | PoolCall) -> Plan:
        raise AssertionError("never asked")


class OddPriority(Marker):
    priority = "high"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (Marker, r"must be an instance, got the class Marker; pass Marker\(\)"),
        (5, "must be a gdn.Backend, got int; derive a class from it"),
        (
            NoCapabilities(),
            "capabilities of backend NoCapabilities must be a Capabilities, got None",
        ),
        (OddPriority(), "priority of backend 'marker' must be a number or None, got 'high'"),
    ],
)
def test_what_is_no_backend_is_refused(thing: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        gdn.register_backend(thing)


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[], object]]]:
    """Entry points by name, as packages would bring them; filled in by the test."""
    found: dict[str, Callable[[], object]] = {}

    def entries(group: str) -> list[importlib.metadata.EntryPoint]:
        return [importlib.metadata.EntryPoint(name, f"package:{name}", group) for name in found]

    entry_point = importlib.metadata.EntryPoint
    monkeypatch.setattr(entry_point, "load", lambda self: found[self.name]())
    monkeypatch.setattr(importlib.metadata, "entry_points", entries)
    registry._load_entry_points.cache_clear()
    yield found
    registry._load_entry_points.cache_clear()


def leave() -> object:
    raise SystemExit("no licence")


def lack() -> object:
    raise ImportError("no such symbol")


def test_entry_points_are_loaded_and_each_failure_is_reported_once(
    offers: dict[str, Callable[[], object]],
) -> None:
    offers |= {"third": lambda: Marker("third", 3), "fourth": lambda: NamedFourth}
    offers |= {"lacks": lack, "odd": object, "leaves": leave, "without": NoCapabilities}
    with pytest.warns(RuntimeWarning) as caught:
        assert which_ran(backend="third") == 3
    assert which_ran(backend="fourth") == 4
    texts = [str(warning.message) for warning in caught]
    faults = {
        "lacks": "ImportError: no such symbol",
        "odd": "TypeError: backend must be a gdn.Backend, got object",
        "leaves": "SystemExit: no licence",
        "without": "TypeError: capabilities of backend NoCapabilities",
    }
    for name, fault in faults.items():
        assert [f"'{name}'" in text and fault in text for text in texts].count(True) == 1
    names = {info.name for info in gdn.list_backends()}
    assert {"third", "fourth"} <= names
    assert not names & set(faults)
    assert gdn.explain(**INPUTS).chosen == "torch"


class NamedFourth(Marker):
    """An entry point may also name a class."""

    def __init__(self) -> None:
        super().__init__("fourth", 4)


class Returns(Marker):
    """Returns what it is told to."""

    def __init__(self, forward: Any = None, gradients: Any = None, o: Any = None) -> None:
        super().__init__("returns", backward=True, decode=(torch.float32,), speculative=True)
        self.returned = {"forward": forward, "gradients": gradients, "o": o}

    def plan(self, call: Call | PoolCall) -> Plan:
        return ReturnsPlan(self.returned)


class ReturnsPlan(MarkerPlan):
    def __init__(self, returned: dict[str, Any]) -> None:
        super().__init__(1)
        self.returned = returned

    def forward(self, call: Call, save: bool) -> Forward:
        change = self.returned["forward"]
        found = super().forward(call, save)
        return change(found) if change else found

    def backward(self, call: Call, *args: Any) -> Gradients:
        found = Gradients(*(None if x is None else x.clone() for x in call.differentiable))
        change = self.returned["gradients"]
        return change(found) if change else found

    def decode(self, step: Step) -> torch.Tensor:
        return self.returned["o"](step.call.v.clone())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f._replace(o=f.o.double()), r"o as torch.float32 \[1, 3, 2, 4\].*float64"),
        (lambda f: f._replace(o=f.o[:, 1:]), r"o as .*got torch.float32 \[1, 2, 2, 4\] on cpu"),
        (lambda f: f._replace(o=f.o.to("meta")), r"o as .* on cpu, got .* on meta"),
        (lambda f: f._replace(final_state=None), r"final_state as .*, got NoneType"),
        (lambda f: f._replace(final_state=f.final_state.mT[..., 1:]), "final_state as"),
        (lambda f: f._replace(saved=[f.o]), "saved, as saved_like has it, of 0 items, got 1"),
        (lambda f: f.o, "Forward of 3 items, got Tensor"),
    ],
)
def test_wrong_outputs_are_named(change: Any, words: str) -> None:
    gdn.register_backend(Returns(forward=change))
    with pytest.raises(RuntimeError, match=f"backend 'returns' must return {words}"):
        which_ran(backend="returns")


def test_what_only_forward_knows_is_saved_and_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Returns, "saved_like", lambda self, call: None)
    gdn.register_backend(Returns(forward=lambda f: f._replace(saved=[f.o.clone()])))
    leaves = with_gradients(INPUTS)

    def step() -> torch.Tensor:
        return gdn.gated_delta_net(**leaves, backend="returns").o.sum()

    step().backward()
    assert torch.equal(leaves["v"].grad, leaves["v"])
    with pytest.raises(Exception, match="only its forward knows that; use it without"):
        torch.compile(step, fullgraph=True, backend="aot_eager")()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f._replace(beta=f.beta.double()), "the gradient of beta as torch.float32"),
        (lambda f: f._replace(k=None), "the gradient of k as .*, got NoneType"),
        (lambda f: f[:5], "Gradients of 8 items, got 5"),
    ],
)
def test_wrong_gradients_are_named(change: Any, words: str) -> None:
    gdn.register_backend(Returns(gradients=change))
    o = gdn.gated_delta_net(**with_gradients(INPUTS), backend="returns").o
    with pytest.raises(RuntimeError, match=f"backend 'returns' must return {words}"):
        o.sum().backward()


def test_a_wrong_output_of_decode_is_named() -> None:
    inputs = make_step(StepCase("step", B=2, K=4, V=4))
    gdn.register_backend(Returns(o=lambda v: v.double()))
    with pytest.raises(RuntimeError, match=r"backend 'returns' must return o as torch.float32"):
        gdn.gated_delta_net_decode(**inputs, backend="returns")


def test_results_are_checked_once_a_plan() -> None:
    """Later calls go to the plan itself."""
    seen = []

    def change(found: Forward) -> Forward:
        seen.append(found)
        return found if len(seen) == 1 else found._replace(o=found.o.double())

    gdn.register_backend(Returns(forward=change))
    for _ in range(2):
        which_ran(backend="returns")
    assert len(seen) == 2
