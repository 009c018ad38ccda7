"""What gdn's plugin for vLLM registers and when, on stand-ins for the few names of vLLM that it
relies on. tests/test_vllm_engine.py drives vLLM's own registry."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gdn.integrations import vllm as plugin

MODULE = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Packages of vLLM's names: a version, a platform, a registry and the module of one layer."""
    platform = SimpleNamespace(is_cuda=lambda: True)
    folder = tmp_path.joinpath(*MODULE.split(".")[:-1])
    folder.mkdir(parents=True)
    for parent in (folder, *folder.parents):
        if parent == tmp_path:
            break
        (parent / "__init__.py").touch()
    (folder / "qwen_gdn_linear_attn.py").write_text(
        "from vllm.model_executor.custom_op import PluggableLayer\n"
        "class QwenGatedDeltaNetAttention(PluggableLayer): pass\n"
    )
    (tmp_path / "vllm" / "platforms.py").touch()
    (tmp_path / "vllm" / "model_executor" / "custom_op.py").write_text(
        "op_registry_oot = {}\n"
        "class PluggableLayer:\n"
        "    @classmethod\n"
        "    def register_oot(cls, _decorated_layer_cls=None, name=None):\n"
        "        def decorator(made):\n"
        "            assert name not in op_registry_oot\n"
        "            op_registry_oot[name] = made\n"
        "            return made\n"
        "        return decorator\n"
    )
    for name in [x for x in sys.modules if x == "vllm" or x.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    root: Any = importlib.import_module("vllm")
    root.__version__ = "0.33.0"
    platforms: Any = importlib.import_module("vllm.platforms")
    platforms.current_platform = platform
    layers: Any = ModuleType("gdn.integrations.vllm_layers")
    layers.MAKERS = {  # the real one needs all of vLLM
        "QwenGatedDeltaNetAttention": lambda module: type(
            "Qwen", (module.QwenGatedDeltaNetAttention,), {"__module__": "gdn.test"}
        )
    }
    monkeypatch.setitem(sys.modules, layers.__name__, layers)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(plugin, "_said", set())
    for name in ("GDN_VLLM", "VLLM_GDN_DECODE_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    yield SimpleNamespace(root=root, platform=platform)
    for name in [x for x in sys.modules if x == "vllm" or x.startswith("vllm.")]:
        del sys.modules[name]


def registered() -> dict[str, type]:
    found: dict[str, type] = importlib.import_module(
        "vllm.model_executor.custom_op"
    ).op_registry_oot
    return found


def test_layers_are_registered_when_vllm_imports_them(vllm: SimpleNamespace) -> None:
    plugin.register()
    plugin.register()
    assert MODULE not in sys.modules, "the import would ask for the GPU"
    module = importlib.import_module(MODULE)
    made = registered()["QwenGatedDeltaNetAttention"]
    assert issubclass(made, module.QwenGatedDeltaNetAttention)
    plugin.register()  # in a process that has the module already
    assert registered() == {"QwenGatedDeltaNetAttention": made}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "0.34.0"}, "vLLM must be 0.33.x, got 0.34.0"),
        ({"platform": False}, "the platform must be CUDA"),
        ({"GDN_VLLM": "0"}, "GDN_VLLM=0"),
        ({"GDN_VLLM": "yes"}, "GDN_VLLM must be layers, prefill or 0, got 'yes'"),
    ],
)
def test_refusals(
    vllm: SimpleNamespace, change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    vllm.root.__version__ = change.get("version", "0.33.0")
    if "platform" in change:
        vllm.platform.is_cuda = lambda: False
    if "GDN_VLLM" in change:
        monkeypatch.setenv("GDN_VLLM", change["GDN_VLLM"])
    with caplog.at_level(logging.INFO, "vllm.gdn"):
        plugin.register()
        plugin.register()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("gdn leaves vLLM as it is: ")
    assert words in caplog.messages[0]
    importlib.import_module(MODULE)
    assert registered() == {}


def test_another_plugin_keeps_its_layer(
    vllm: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    registered()["QwenGatedDeltaNetAttention"] = dict
    plugin.register()
    with caplog.at_level(logging.INFO, "vllm.gdn"):
        importlib.import_module(MODULE)
    assert registered() == {"QwenGatedDeltaNetAttention": dict}
    assert "replaces it already" in caplog.text


def test_vllm_starts_when_gdn_fails(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(module: ModuleType) -> type:
        raise ImportError("no such name")

    makers = sys.modules["gdn.integrations.vllm_layers"].MAKERS
    monkeypatch.setitem(makers, "QwenGatedDeltaNetAttention", fail)
    plugin.register()
    with caplog.at_level(logging.INFO, "vllm.gdn"):
        importlib.import_module(MODULE)
    assert registered() == {}
    assert "leaves QwenGatedDeltaNetAttention to vLLM: ImportError: no such name" in caplog.text


def test_entry_point() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="gdn")
    if not found:
        pytest.skip("gdn is not installed")
    assert [point.load() for point in found] == [plugin.register]
