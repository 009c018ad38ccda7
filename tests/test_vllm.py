"""gdn's plugin for vLLM without vLLM: batches from metadata of vLLM's fields, on pools in byte
pages, and what is registered when. tests/test_vllm_engine.py drives the engine itself."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_batches import Layer, Row, check, fill, make_request, together

import gdn
from gdn.integrations import vllm as plugin
from gdn.integrations.vllm_batch import Rule, Tokens, run_batch, run_sample, samples
from gdn.testing import TOLERANCE

LAYERS = {
    "heads": Layer(),
    "negative": Layer(allow_neg_eigval=True),
    "channels": Layer(H=4, V=16, per_channel=True),
    "bound": Layer(H=4, V=16, per_channel=True, gate_lower_bound=-5.0),
}


class Identity:
    """In place of vLLM's convolution."""

    def speculative(self, x: Tensor) -> Tensor:
        return x

    others = speculative


def make_rule(layer: Layer) -> Rule:
    options = {
        "A_log": layer.A_log, "dt_bias": layer.dt_bias, "backend": "torch",
        "gate_lower_bound": layer.gate_lower_bound, "allow_neg_eigval": layer.allow_neg_eigval,
    }  # fmt: skip
    return Rule(layer.H, layer.HV, layer.K, layer.V, options)


def make_pool(layer: Layer, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Pages of bytes, 20 blocks, and the states in them, behind 96 bytes of something else."""
    size = layer.HV * layer.V * layer.K * dtype.itemsize
    pages = torch.zeros(20, 96 + size + 32, dtype=torch.int8)
    states = pages[:, 96 : 96 + size].view(dtype).view(20, layer.HV, layer.V, layer.K)
    return pages, states


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def integers(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_metadata(rows: list[Row], padding: int = 0, columns: int = 3) -> SimpleNamespace:
    """The fields of vLLM's metadata of a batch, with so many padding rows, without tokens, and
    tokens behind it."""
    speculative = [row for row in rows if row.accepted is not None]
    plain = [row for row in rows if row.accepted is None]
    decodes = [row for row in plain if row.length == 1 and row.start and not speculative]
    prefills = [row for row in plain if row not in decodes]
    slots = torch.zeros(len(plain) + padding, 2, dtype=torch.int32)  # [:, 0] is strided
    slots[: len(plain), 0] = integers([row.slots[0] for row in plain])
    marks = [row.checkpoint or (0, 0) for row in plain] + [(0, 0)] * padding
    table = [list(row.slots) + [0] * (columns - len(row.slots)) for row in speculative]
    kinds = torch.cat(
        [torch.zeros(0)] + [torch.full((row.length,), row.accepted is not None) for row in rows]
    ).bool()
    lengths = [row.length for row in prefills] + [0] * padding
    return SimpleNamespace(
        num_prefills=len(prefills),
        num_decodes=0 if not decodes else len(decodes) + (0 if prefills else padding),
        num_decode_tokens=len(decodes),
        num_spec_decodes=len(speculative) + (padding if not plain else 0),
        num_actual_tokens=sum(row.length for row in rows) + (0 if prefills else padding),
        spec_sequence_masks=torch.ones(1, dtype=torch.bool) if speculative else None,
        spec_token_indx=kinds.nonzero()[:, 0],
        non_spec_token_indx=(~kinds).nonzero()[:, 0],
        spec_query_start_loc=bounds([row.length for row in speculative] + [0] * padding),
        spec_state_indices_tensor=integers(table + [[0] * columns] * padding),
        num_accepted_tokens=integers([row.accepted for row in speculative] + [1] * padding),
        non_spec_state_indices_tensor=slots[:, 0],
        prefill_query_start_loc=bounds(lengths),
        prefill_state_indices=slots[len(decodes) :, 0],
        prefill_has_initial_state=torch.tensor(
            [row.start > 0 for row in prefills] + [False] * padding
        ),
        checkpoint=SimpleNamespace(
            checkpoint_offsets=integers([offset for offset, _ in marks]),
            state_indices=integers([slot for _, slot in marks]),
        ) if any(offset for offset, _ in marks) else None,
    )  # fmt: skip


def make_rows(kind: str, layer: Layer) -> list[Row]:
    a, b, c, d = (make_request(layer, seed, 160) for seed in (11, 12, 13, 14))
    return {
        "mixed": [
            Row(a, 30, 1, (5,)), Row(b, 7, 1, (3,)), Row(c, 20, 140, (9,), checkpoint=(64, 11)),
            Row(d, 0, 70, (2,)),
        ],
        "decodes": [Row(a, 30, 1, (5,)), Row(b, 7, 1, (3,)), Row(c, 20, 1, (9,))],
        "speculative": [Row(a, 30, 3, (5, 6, 7), 2), Row(b, 9, 3, (1, 8, 2), 1)],
        "speculative-mixed": [
            Row(a, 30, 3, (5, 6, 7), 3), Row(c, 20, 1, (9,)), Row(b, 9, 2, (1, 8), 1),
            Row(d, 0, 70, (3,)),
        ],
    }[kind]  # fmt: skip


def run(rows: list[Row], layer: Layer, padding: int, dtype: torch.dtype, tolerance: float) -> None:
    metadata = make_metadata(rows, padding)
    pages, pool = make_pool(layer, dtype)
    fill(pool, rows)
    before, pages_before = pool.clone(), pages.clone()
    behind = 4  # tokens of a captured graph
    tokens = (
        torch.cat([x, torch.full_like(x[:1], torch.nan).expand(behind, *x.shape[1:])])
        for x in (together(rows, name) for name in ("qkv", "gate", "beta"))
    )
    live = len(together(rows, "o"))
    out = torch.zeros(live + behind, layer.HV, layer.V)
    with torch.inference_mode():
        run_batch(metadata, Tokens(*tokens), make_rule(layer), Identity(), pool, out)
    check(rows, out, before, pool, tolerance)
    assert not out[live:].any(), "padding must stay zero"
    gaps = torch.ones_like(pages, dtype=torch.bool)
    gaps[:, 96:-32] = False
    assert torch.equal(pages[gaps], pages_before[gaps])


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("kind", ["mixed", "decodes", "speculative", "speculative-mixed"])
@pytest.mark.parametrize("layer", LAYERS)
def test_batches(layer: str, kind: str, padding: int) -> None:
    if kind == "speculative-mixed" and padding:
        pytest.skip("vLLM captures graphs of one kind of steps")
    rows = make_rows(kind, LAYERS[layer])
    run(rows, LAYERS[layer], padding, torch.float32, TOLERANCE[torch.float32])


def test_pool_in_bfloat16() -> None:
    layer = LAYERS["heads"]
    run(make_rows("mixed", layer), layer, 1, torch.bfloat16, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("per_channel", [False, True])
def test_samples_touch_no_state(per_channel: bool) -> None:
    layer = LAYERS["channels" if per_channel else "heads"]
    _, pool = make_pool(layer)
    pool.normal_()
    before = pool.clone()
    calls = list(samples(make_rule(layer), pool, torch.bfloat16, per_channel, 3, True))
    assert [call.prefill for call in calls] == [False, False, True, True]
    with torch.inference_mode():
        for call in calls:
            name = gdn.warmup(**call.tokens, **call.keywords, prefill=call.prefill)
            assert name == "torch"
            run_sample(call)
    assert torch.equal(pool, before)


# The registration, on stand-ins for the few names of vLLM that it relies on.

MODULE = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Packages of vLLM's names: a version, a platform, a registry and the module of one layer."""
    platform = SimpleNamespace(is_cuda=lambda: True)
    stand_in = SimpleNamespace(version="0.33.0", platform=platform, registry={})
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda x: stand_in.version if x == "vllm" else version(x)
    )
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
    importlib.import_module("vllm.platforms").current_platform = platform
    layers = ModuleType("gdn.integrations.vllm_layers")
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
    yield stand_in
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
    vllm.version = change.get("version", vllm.version)
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
