"""Stacks of linear attention layers of Qwen3.5-4B's shape, without MLPs or with one after each:
transformers' layers, as they are and patched, and gdn.nn's, with the same weights."""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdn.nn
from gdn.compare.timing import Timing
from gdn.integrations.transformers import patch
from gdn.parts import load

WIDTH, INNER = 2560, 9216
"""Of the residual stream and of an MLP, as in Qwen3.5-4B."""
HEADS = {"num_k_heads": 16, "num_v_heads": 32, "head_k_dim": 128, "head_v_dim": 128}
SMALL = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 16, "head_v_dim": 16}
ENGINES = ("transformers", "patched", "gdn.nn")


def install_convolution() -> None:
    """Without causal-conv1d, put fla's convolution under its name, so that transformers, which
    looks for nothing else, has a kernel too. To be called before transformers is imported."""
    if find_spec("causal_conv1d") is not None or find_spec("fla") is None:
        return
    load("causal_conv1d")  # gdn remembers that it is not there, and takes fla's kernels itself
    from fla.modules.causal_conv1d import causal_conv1d, causal_conv1d_update

    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if seq_idx is not None:
            raise ValueError("seq_idx must be None, got a tensor; this stand-in has no packs")
        start = None if initial_states is None else F.pad(initial_states, (1, 0)).contiguous()
        y: Tensor = causal_conv1d(x.mT, weight, bias, initial_state=start, activation=activation)[0]
        return y.mT

    def update(
        x: Tensor, cache: Tensor, weight: Tensor, bias: Any = None, activation: Any = None
    ) -> Tensor:
        if x.shape[2] != 1:
            raise ValueError(f"x must have one token, got {x.shape[2]}")
        y: Tensor = causal_conv1d_update(
            x[..., 0], cache, weight=weight, bias=bias, activation=activation
        )[0]
        return y[..., None]

    module: Any = ModuleType("causal_conv1d")
    module.__spec__ = ModuleSpec("causal_conv1d", None)
    module.causal_conv1d_fn, module.causal_conv1d_update = causal_conv1d_fn, update
    sys.modules["causal_conv1d"] = module


def use_plain_transformers() -> None:
    """On a CPU let transformers run its own PyTorch code, even if fla, which needs a GPU, is
    installed."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as module

    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        setattr(module, name, inspect.unwrap(getattr(module, name)))


class Stack(nn.Module):
    """Layers on a residual stream, each with an MLP behind it or none. A norm without weights
    precedes each of them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers, self.mlps = nn.ModuleList(layers), nn.ModuleList()

    def run(self, layer: nn.Module, number: int, x: Tensor, cache: Any) -> Tensor:
        raise NotImplementedError

    def make_cache(self, batch: int) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = x + self.run(layer, number, F.rms_norm(x, x.shape[-1:]), cache)
            if self.mlps:
                x = x + self.mlps[number](F.rms_norm(x, x.shape[-1:]))
        return x


class Native(Stack):
    """gdn.nn's layers."""

    def run(self, layer: nn.Module, number: int, x: Tensor, cache: Any) -> Tensor:
        found: Tensor = layer(x, cache=None if cache is None else cache[number])
        return found

    def make_cache(self, batch: int) -> Any:
        layers: Any = self.layers
        return [layer.make_cache(batch) for layer in layers]


class Transformers(Stack):
    """transformers' layers of Qwen3.5. After each is the model's own MLP, unless inner is None."""

    def __init__(
        self, layers: int, width: int, heads: Mapping[str, int], inner: int | None
    ) -> None:
        from transformers.models.qwen3_5 import configuration_qwen3_5, modeling_qwen3_5

        make_config: Any = configuration_qwen3_5.Qwen3_5TextConfig
        make_layer: Any = modeling_qwen3_5.Qwen3_5GatedDeltaNet
        self.config = make_config(
            hidden_size=width, num_hidden_layers=layers,
            layer_types=["linear_attention"] * layers,
            **{f"linear_{new}": heads[old] for new, old in _QWEN_NAMES.items()},
        )  # fmt: skip
        super().__init__([make_layer(self.config, n) for n in range(layers)])
        if inner is not None:
            make_mlp: Any = modeling_qwen3_5.Qwen3_5MLP
            self.mlps.extend(make_mlp(self.config, inner) for _ in range(layers))
        accepted = inspect.signature(make_layer.forward).parameters
        self.name = "cache" if "cache" in accepted else "cache_params"

    def run(self, layer: nn.Module, number: int, x: Tensor, cache: Any) -> Tensor:
        found: Tensor = layer(x, **{self.name: cache})
        return found

    def make_cache(self, batch: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.config)


_QWEN_NAMES = {
    "num_key_heads": "num_k_heads", "num_value_heads": "num_v_heads",
    "key_head_dim": "head_k_dim", "value_head_dim": "head_v_dim",
}  # fmt: skip


class Engine(NamedTuple):
    """A stack, and the context in which it runs."""

    stack: Stack
    context: Callable[[], AbstractContextManager[Any]]


def make_engines(
    layers: int,
    device: torch.device,
    dtype: torch.dtype,
    small: bool = False,
    with_mlps: bool = False,
) -> dict[str, Engine]:
    """The `ENGINES`, with equal weights. small: sizes for a CPU; with_mlps: one a layer,
    which the engines share."""
    width, inner, heads = (64, 128, SMALL) if small else (WIDTH, INNER, HEADS)
    make_layer: Any = gdn.nn.GatedDeltaNet
    torch.manual_seed(0)
    with torch.device(device):
        theirs = Transformers(layers, width, heads, inner if with_mlps else None).to(dtype)
        ours = Native([make_layer(width, **heads, dtype=dtype) for _ in range(layers)])
    ours.mlps = theirs.mlps
    ours.load_state_dict(theirs.state_dict())
    return {
        "transformers": Engine(theirs, nullcontext),
        "patched": Engine(theirs, lambda: patch(theirs)),
        "gdn.nn": Engine(ours, nullcontext),
    }


def make_run(engine: Engine, which: str, x: Tensor) -> Callable[[], Tensor]:
    """A pass of a stack on x [B, T, width]: "prefill" into a new cache; "decode", a step after a
    prompt of 8 tokens; "train", forward and backward."""
    stack = engine.stack
    if which == "train":

        def train() -> Tensor:
            for parameter in stack.parameters():
                parameter.grad = None
            y: Tensor = stack(x)
            torch.autograd.backward(y, x)
            return y.detach()

        return train

    @torch.no_grad()
    def prefill() -> Tensor:
        y: Tensor = stack(x, stack.make_cache(x.shape[0]))
        return y

    if which == "prefill":
        return prefill
    cache = stack.make_cache(x.shape[0])
    with torch.no_grad(), engine.context():
        stack(x.expand(-1, 8, -1).contiguous(), cache)

    @torch.no_grad()
    def step() -> Tensor:
        y: Tensor = stack(x, cache)
        return y

    return step


def compile_step(engine: Engine, x: Tensor, backend: str = "inductor") -> Callable[[], Tensor]:
    """`make_run`'s decode step as one compiled graph, captured in a CUDA graph by Inductor. The
    engine's context must be on, also while it runs."""
    stack, cache = engine.stack, engine.stack.make_cache(x.shape[0])
    with torch.no_grad():
        stack(x.expand(-1, 8, -1).contiguous(), cache)
    for own in cache if isinstance(cache, list) else ():
        torch._dynamo.mark_static_address(own.conv)
        torch._dynamo.mark_static_address(own.state)
    mode = "reduce-overhead" if backend == "inductor" else None
    compiled = torch.compile(stack, fullgraph=True, mode=mode, backend=backend)

    @torch.no_grad()
    def step() -> Tensor:
        y: Tensor = compiled(x, cache)
        return y

    return step


def interleave(
    engines: Mapping[str, Engine],
    runs: Mapping[str, Callable[[], Tensor]],
    seconds: float,
    each: int = 1,
) -> dict[str, Timing]:
    """Wall milliseconds of a run, the engines in turns. `each` runs make a sample: two decode
    steps may overlap on the host and the device, as in generation."""

    def once(name: str) -> float:
        with engines[name].context():
            runs[name]()
            wait()
            start = time.perf_counter()
            for _ in range(each):
                runs[name]()
            wait()
            return 1e3 * (time.perf_counter() - start) / each

    longest = max(once(name) for name in runs for _ in range(2))
    turns = max(3, min(30, round(1e3 * seconds / (len(runs) * longest * (each + 1)))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name in runs:
            samples[name].append(once(name))
    found = {}
    for name, times in samples.items():
        low, _, high = statistics.quantiles(times, n=4)
        found[name] = Timing(statistics.median(times), (high - low) / 2, turns, "wall")
    return found


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_launches(run: Callable[[], object]) -> int:
    """Kernels and copies that one run starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        run()
        wait()
    return sum("CUDA" in str(event.device_type) for event in found.events() or ())
