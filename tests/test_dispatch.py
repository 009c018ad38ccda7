"""Choosing a backend: precedence, strictness, near misses, reasons, registration, entry points."""

from __future__ import annotations

import importlib.metadata
import threading
from typing import Any

import pytest
import torch

import gdn
from gdn import dispatch, registry
from gdn.backend import Backend, Capabilities, Forward, Plan
from gdn.problem import FLAGS, Call, Problem, Step
from gdn.testing import Case, make_inputs

pytestmark = pytest.mark.usefixtures("clean_registry")
INPUTS = make_inputs(Case("dispatch", T=3, K=4, V=4))


class Marker(Backend):
    """Fills o with its own number, so that a test sees which backend ran."""

    name = "marker"
    summary = "for tests"
    capabilities = Capabilities(dtypes=(torch.float32,))

    def __init__(self, name: str = "marker", number: float = 1.0, **capabilities: Any) -> None:
        self.name = name  # type: ignore[misc]
        self.number = number
        able = {"dtypes": (torch.float32,), "initial_state": True, "flags": frozenset(FLAGS)}
        self.capabilities = Capabilities(**able | capabilities)  # type: ignore[misc]

    def plan(self, call: Call | Step) -> Plan:
        return MarkerPlan(self.number)


class MarkerPlan(Plan):
    def __init__(self, number: float) -> None:
        self.number = number

    def forward(self, call: Call, save: bool) -> Forward:
        state = call.q.new_zeros(call.state_shape) if call.output_final_state else None
        return Forward(torch.full_like(call.v, self.number), state, [])


def which_ran(**kwargs: Any) -> float:
    """The number of the backend that ran the call."""
    return gdn.gated_delta_net(**INPUTS, **kwargs).o.flatten()[0].item()


@pytest.fixture
def four(clean_registry: None) -> None:
    for n, name in enumerate(("one", "two", "three", "four"), 1):
        gdn.register_backend(Marker(name, n))


@pytest.mark.usefixtures("four")
def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, then context, then default, then GDN_BACKEND read at call time, then auto."""
    monkeypatch.setenv("GDN_BACKEND", "one")
    assert which_ran() == 1
    gdn.set_default_backend("two")
    assert which_ran() == 2
    with gdn.use_backend("three"):
        assert which_ran() == 3
        with gdn.use_backend("one"):
            assert which_ran() == 1
        assert which_ran(backend="four") == 4
        assert which_ran() == 3
    assert which_ran() == 2
    gdn.set_default_backend(None)
    assert which_ran() == 1
    monkeypatch.setenv("GDN_BACKEND", "two")
    assert which_ran() == 2
    monkeypatch.delenv("GDN_BACKEND")
    assert gdn.explain(**INPUTS).chosen == "torch"
    assert gdn.explain(**INPUTS).source == "default"


@pytest.mark.usefixtures("four")
def test_context_ends_with_an_exception_and_stays_in_its_thread() -> None:
    seen = []

    def look_from_another_thread() -> None:
        thread = threading.Thread(target=lambda: seen.append(dispatch.request_in_force()[0]))
        thread.start()
        thread.join()
        raise KeyError

    with pytest.raises(KeyError), gdn.use_backend("one"):
        look_from_another_thread()
    assert seen == ["auto"]
    assert dispatch.request_in_force()[0] == "auto"


def test_a_named_backend_is_strict_and_a_list_falls_through() -> None:
    gdn.register_backend(Marker("picky", 7, head_dims=(128,), devices=("cuda",)))
    with pytest.raises(gdn.BackendUnsupportedError) as refusal:
        which_ran(backend="picky")
    assert refusal.value.reasons.keys() == {"picky"}
    text = str(refusal.value)
    for reason in (
        "K must be one of 128, got 4",
        "V must be one of 128",
        "must be on cuda, got cpu",
    ):
        assert reason in text
    gdn.register_backend(Marker("easy", 5))
    assert which_ran(backend="picky, easy") == 5
    assert which_ran(backend="easy,torch") == 5
    gdn.explain(**INPUTS, backend="picky,auto")
    with pytest.raises(gdn.BackendUnsupportedError) as refusal:
        which_ran(backend="picky,fla")
    assert refusal.value.reasons.keys() == {"picky", "fla"}


@pytest.mark.parametrize("name", ["troch", "toch,torch", "", " , "])
def test_unknown_names_raise_with_near_misses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN_BACKEND", "fla")
    for attempt in (
        lambda: which_ran(backend=name),
        lambda: gdn.use_backend(name).__enter__(),
        lambda: gdn.set_default_backend(name),
    ):
        with pytest.raises(gdn.UnknownBackendError, match=r"torch|auto"):
            attempt()
    monkeypatch.setenv("GDN_BACKEND", "torhc")
    with pytest.raises(gdn.UnknownBackendError, match="did you mean 'torch'"):
        which_ran()


def test_registering() -> None:
    gdn.register_backend(Marker())
    assert which_ran(backend="marker") == 1
    with pytest.raises(ValueError, match="replace=True"):
        gdn.register_backend(Marker())
    with pytest.raises(ValueError, match="replace=True"):
        gdn.register_backend(Marker("torch"))
    for bad in ("auto", "a,b", "a b", ""):
        with pytest.raises(ValueError, match="plain word"):
            gdn.register_backend(Marker(bad))
    gdn.register_backend(Marker(number=2), replace=True)
    assert which_ran(backend="marker") == 2  # dispatch does not use the remembered plan
    gdn.unregister_backend("marker")
    with pytest.raises(gdn.UnknownBackendError):
        which_ran(backend="marker")


def test_auto_takes_only_backends_with_a_priority() -> None:
    gdn.register_backend(Marker())
    assert gdn.explain(**INPUTS).chosen == "torch"
    keen = Marker("keen", 9)
    keen.priority = 1000  # type: ignore[misc]
    gdn.register_backend(keen)
    assert which_ran() == 9
    names = [info.name for info in gdn.list_backends()]
    assert names.index("keen") < names.index("fla") < names.index("torch") < names.index("marker")


def test_a_missing_package_is_a_reason_and_an_exception_is_raised() -> None:
    gdn.register_backend(Marker("lacking", packages=("no_such_package",)))
    row = next(info for info in gdn.list_backends() if info.name == "lacking")
    assert (row.available, row.reason) == (False, "not installed: no_such_package")
    with pytest.raises(gdn.BackendUnsupportedError, match="not installed: no_such_package"):
        which_ran(backend="lacking")

    class Broken(Marker):
        def unsupported(self, problem: Problem) -> list[str]:
            raise ZeroDivisionError

    gdn.register_backend(Broken("broken"))
    with pytest.raises(ZeroDivisionError):
        which_ran(backend="broken,torch")


def test_entry_points_are_loaded_and_their_failures_give_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offer(name: str, thing: Any) -> importlib.metadata.EntryPoint:
        entry = importlib.metadata.EntryPoint(name, f"package:{name}", "gdn.backends")
        monkeypatch.setattr(type(entry), "load", lambda self: offers[self.name]())
        offers[name] = thing
        return entry

    def broken() -> Backend:
        raise ImportError("no such symbol")

    offers: dict[str, Any] = {}
    entries = [offer("third", lambda: Marker("third", 3)), offer("bad", broken)]
    entries.append(offer("odd", lambda: object()))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    registry._load_entry_points.cache_clear()
    with pytest.warns(RuntimeWarning) as caught:
        assert which_ran(backend="third") == 3
    texts = [str(warning.message) for warning in caught]
    assert any("'bad'" in text and "no such symbol" in text for text in texts)
    assert any("'odd'" in text and "not a gdn.backend.Backend" in text for text in texts)
    assert {"third"} <= {info.name for info in gdn.list_backends()}


class Preferred(Marker):
    """First in "auto" once it is registered; claims backward, but has none."""

    priority = 1000

    def __init__(self, name: str) -> None:
        super().__init__(name, 7, backward=True)


@pytest.mark.parametrize("name", ["preferred", "torch"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_backend_of_forward_runs_backward(name: str, compiled: bool) -> None:
    """Even if another backend is registered in between, also under the same name."""

    def forward(v: torch.Tensor) -> torch.Tensor:
        return gdn.gated_delta_net(**INPUTS | {"v": v}).o

    v = INPUTS["v"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(forward(v).sum(), v)
    torch._dynamo.reset()
    run = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    o = run(v)
    gdn.register_backend(Preferred(name), replace=True)
    (got,) = torch.autograd.grad(o.sum(), v)
    assert torch.equal(got, expected)
    with pytest.raises(NotImplementedError, match="MarkerPlan has no backward"):
        forward(v).sum().backward()


@pytest.mark.gpu
def test_falling_back_to_torch_on_a_gpu_warns_once() -> None:
    dispatch._warn_once.cache_clear()
    inputs = make_inputs(Case("slow", T=3, dtype=torch.float64), "cuda")
    with pytest.warns(RuntimeWarning, match="slow torch backend"):
        gdn.gated_delta_net(**inputs)
    gdn.gated_delta_net(**make_inputs(Case("slow", T=4, dtype=torch.float64), "cuda"))
    gdn.gated_delta_net(**inputs, backend="torch")


def test_explain_says_why_for_every_backend() -> None:
    explanation = gdn.explain(**INPUTS, backend="fla")
    assert explanation.chosen is None
    assert explanation.source == "backend= argument"
    verdicts = {verdict.name: verdict for verdict in explanation.verdicts}
    assert verdicts["torch"].reasons == ()
    assert verdicts["fla"].reasons
    text = str(explanation)
    assert all(reason in text for reason in verdicts["fla"].reasons)
    meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in INPUTS.items()}
    assert gdn.explain(**meta).chosen == "torch"
    with pytest.raises(ValueError, match="beta must be"):
        gdn.explain(**INPUTS | {"beta": torch.zeros(1)})
