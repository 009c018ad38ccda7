"""Choosing a backend: precedence, strictness, near misses, reasons, registration."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from marker import INPUTS, Marker, which_ran

import gdn
from gdn import dispatch
from gdn.testing import Case, make_inputs

pytestmark = pytest.mark.usefixtures("clean_registry")


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


def test_auto_takes_the_highest_priority() -> None:
    """A list keeps its own order."""
    first, second = Marker("first", 7), Marker("second", 9)
    first.priority, second.priority = 500, 470  # type: ignore[misc]
    for backend in (second, first):
        gdn.register_backend(backend)
    assert which_ran(backend="auto") == 7
    names = dispatch.parse_request("auto")
    assert names[:2] == ["first", "second"]
    own = dispatch.parse_request(dispatch.OWN_KERNELS)
    assert own == [name for name in names if name not in ("fla", "torch")]
    assert dispatch.parse_request("second,first") == ["second", "first"]


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
    with pytest.raises(
        gdn.UnknownBackendError, match=r"^environment variable GDN_BACKEND: .*'torch'"
    ):
        which_ran()
    with pytest.raises(gdn.UnknownBackendError, match=r"^unknown backend 'toch'"):
        which_ran(backend="toch")


@pytest.mark.parametrize("request_", [5, ["torch"], b"torch", None])
def test_a_request_that_is_not_a_str_is_a_type_error(request_: Any) -> None:
    with pytest.raises(TypeError, match=r"name must be a str, got .*write several"):
        gdn.use_backend(request_).__enter__()
    if request_ is not None:
        with pytest.raises(TypeError, match=r"name must be a str, got .*write several"):
            gdn.set_default_backend(request_)


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
