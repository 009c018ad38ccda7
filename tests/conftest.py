"""Fixtures of the suite: devices, the backends under test, and a registry left as it was found."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

import gdn
from gdn import registry

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = [info.name for info in gdn.list_backends()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_configure() -> None:
    """Keep peers' import-time warnings and autotuning out of the suite; neither is under test."""
    os.environ.pop("GDN_BACKEND", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import fla.ops.gated_delta_rule  # noqa: F401
            from triton.runtime.autotuner import Autotuner
        except ImportError:
            return
    # two configurations each, not dozens: the second in case the first does not fit the device
    every = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, kwargs: every(self, kwargs)[:2]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every registered backend. A test asks `able` whether it can run, and else expects a
    refusal."""
    return request.param


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Undo registrations and defaults."""
    before, default = dict(registry._backends), registry._default
    yield
    registry._backends.clear()
    registry._backends.update(before)
    registry._chosen.clear()
    registry._default = default
