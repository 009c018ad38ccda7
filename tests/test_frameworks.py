"""docs/frameworks.md: its lines of code run, and its table is that of the models that gdn knows."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FRAMEWORKS, documented_code

import gdn
from gdn.integrations.transformers_models import MODELS
from gdn.testing import Case, make_inputs

pytestmark = pytest.mark.skipif(not FRAMEWORKS.exists(), reason="not in a checkout")
ELSEWHERE = {"Megatron-core": "test_megatron.py"}


def run_section(title: str, **given: Any) -> dict[str, Any]:
    """The names that the lines of a section leave."""
    exec(documented_code()[title], given)
    return given


def test_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    models = importlib.import_module("models")
    model, ids = models.make_model("qwen3_next", "cpu"), models.padded("cpu", 20)["input_ids"]
    module = models.modelling("qwen3_next")
    before = dict(vars(module))
    assert run_section("transformers", model=model, ids=ids)["logits"].shape == (2, 20, 64)
    assert dict(vars(module)) == before


@pytest.mark.parametrize("stub", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_transformers_by_configuration(
    stub: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a CPU, for which transformers has no local repositories, a stub takes it."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    models = importlib.import_module("models")
    module = models.modelling("qwen3_next")
    if not hasattr(module, "use_kernel_func_from_hub_with_fallback"):
        pytest.skip("functions of this transformers are not for the kernels library")
    monkeypatch.chdir(tmp_path)
    if not stub:
        utilities = importlib.import_module("transformers.utils.import_utils")
        if not utilities.is_kernels_available():
            pytest.skip(f"transformers needs kernels {utilities.KERNELS_MIN_VERSION} or newer")
        model = models.make_model("qwen3_next", "cuda")
        run_section("transformers by configuration", model=model)
        return
    taken: list[Any] = []

    class Stub:
        def set_use_kernels(self, *given: Any) -> None:
            taken.extend(given)

    run_section("transformers by configuration", model=Stub())
    assert taken[0] is True
    assert taken[1].use_local_kernel
    assert (tmp_path / "kernels" / "build" / "torch-universal" / "__init__.py").exists()


def test_fla(own_state: None) -> None:
    pytest.importorskip("fla", reason="fla-core is not installed")
    pytest.importorskip("triton", reason="triton is not installed")
    inputs = make_inputs(Case("documents", T=9, HV=4, initial_state=False))
    tokens = {name: inputs[name] for name in ("q", "k", "v", "g", "beta")}
    found = run_section("fla and what calls it", **tokens)
    expected = gdn.gated_delta_net(**tokens, backend="torch").o
    torch.testing.assert_close(found["o"], expected)


@pytest.fixture
def own_state() -> Any:
    """gdn registered with fla as by a first import, and no longer afterwards."""
    pytest.importorskip("fla", reason="fla-core is not installed")
    integration = importlib.import_module("gdn.integrations.fla")
    integration.register()
    yield
    integration.unregister()


def test_your_own_model() -> None:
    assert run_section("Your own model")["y"].shape == (1, 10, 64)


def test_every_section_with_code_is_run() -> None:
    tested = {"transformers", "transformers by configuration", "fla and what calls it"}
    assert set(documented_code()) == tested | {"Your own model", *ELSEWHERE}


def test_the_table_of_models_is_the_one_of_the_code() -> None:
    rows = [
        f"| {x.title} | `{name}` | per {'channel' if x.per_channel else 'head'} | {x.tried_from} |"
        for name, x in MODELS.items()
    ]
    assert "\n".join(rows) in FRAMEWORKS.read_text()
    readme = (FRAMEWORKS.parents[1] / "README.md").read_text()
    for model in MODELS.values():
        assert model.title in readme
