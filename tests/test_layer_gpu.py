"""What the layer's kernels are for, on a GPU: fewer launches and less memory than PyTorch's parts,
no wait of the host, decode in a CUDA graph; and what fla does under torch.compile. Elsewhere a
compiled graph serves changing slots."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn import convolution, gated_norm
from gdn.compare.timing import peak_memory
from gdn.nn import GatedDeltaNet
from gdn.testing import TOLERANCE, relative_error

layers: Any = importlib.import_module("layers")  # bench/layers.py
HEADS = {"num_k_heads": 4, "num_v_heads": 8, "head_k_dim": 128, "head_v_dim": 128}


def make_layer() -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(512, **HEADS, device="cuda", dtype=torch.bfloat16)


def count(run: Callable[[], object]) -> tuple[int, int]:
    """Launches, and peak bytes, of a run that is not the first."""
    run()
    launches: int = layers.count_launches(run)
    peak = peak_memory(run, torch.device("cuda"))
    assert peak is not None
    return launches, peak


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["prefill", "train", "packed", "step"])
def test_kernels_launch_less_and_need_less_memory(
    monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    layer, x = make_layer(), torch.randn(1, 4096, 512, device="cuda", dtype=torch.bfloat16)
    if convolution.choose(x, 4).engine == convolution.TORCH:
        pytest.skip("no kernel for the convolution is installed")
    ends = torch.tensor([0, 100, 100, 3000, 4096], device="cuda", dtype=torch.int32)
    cache = layer.make_cache(1)

    def run() -> Tensor:
        if which in ("prefill", "step"):
            with torch.no_grad():
                return layer(x[:, : 1 if which == "step" else None], cache=cache)
        y: Tensor = layer(x, cu_seqlens=ends if which == "packed" else None)
        torch.autograd.backward(y, x)
        return y.detach()

    launches, peak = count(run)
    for module in (convolution, gated_norm):
        monkeypatch.setattr(module, "refuse_kernels", lambda x: "for comparison")
    before = count(run)
    assert launches < before[0]
    assert peak <= before[1] if which == "step" else peak < before[1]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_part_waits_for_the_device() -> None:
    layer, x = make_layer(), torch.randn(1, 300, 512, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([0, 100, 100, 250], device="cuda", dtype=torch.int32)
    layer(x, cu_seqlens=ends).sum().backward()  # what is compiled and tuned is ready
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, cu_seqlens=ends).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's own, for its memory
@pytest.mark.parametrize("how", ["graph", "compiled"])
def test_decode_in_a_cuda_graph(how: str) -> None:
    """A step captured once, or compiled with mode="reduce-overhead", goes on as eager steps do."""
    layer, cache, eager = make_layer(), None, None
    x = torch.randn(3, 12, 512, device="cuda", dtype=torch.bfloat16)
    token = x[:, :1].clone()
    with torch.no_grad():
        cache, eager = layer.make_cache(3), layer.make_cache(3)
        for one in (cache, eager):
            layer(x[:, :8], cache=one)
        expected = torch.cat([layer(x[:, n : n + 1], cache=eager) for n in range(8, 12)], 1)
        start = cache.conv.clone(), cache.state.clone()
        found = []
        if how == "graph":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(token, cache=cache)
            step: Callable[[], object] = graph.replay
        else:
            for tensor in (cache.conv, cache.state):
                torch._dynamo.mark_static_address(tensor)
            compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
            for _ in range(3):
                compiled(token, cache=cache)
        cache.conv.copy_(start[0])
        cache.state.copy_(start[1])
        for n in range(8, 12):
            token.copy_(x[:, n : n + 1])
            if how == "graph":
                step()
            else:
                y = compiled(token, cache=cache)
            found.append(y.clone())
    assert relative_error(torch.cat(found, 1), expected) <= TOLERANCE[torch.bfloat16]
    assert relative_error(cache.state, eager.state) <= TOLERANCE[torch.bfloat16]


UNPATCHED = """
import fla.ops.gated_delta_rule.chunk as chunk, layers, torch
stack = layers.make_engines(1, torch.device("cuda"), torch.bfloat16)["transformers"].stack
x = torch.randn(1, 128, layers.WIDTH, device="cuda", dtype=torch.bfloat16)
inner = chunk.chunk_gated_delta_rule_fwd
calls = 0
def called(*args, **kwargs):
    global calls
    calls += 1
    return inner(*args, **kwargs)
chunk.chunk_gated_delta_rule_fwd = called
with torch.no_grad():
    stack(x)
    print("eager", calls, flush=True)
    calls = 0
    torch.compile(stack, fullgraph=True)(x)
    print("compiled", calls)
"""


@pytest.mark.gpu
def test_fla_is_in_no_graph_of_whole_sequences() -> None:
    """It keeps its chunked function out of the compiler: a layer of transformers breaks the graph,
    or runs its own PyTorch where it is compiled. In a new process, which imports fla first: which
    function such a layer takes is settled when it is imported."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("fla", reason="fla is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", UNPATCHED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "eager 1" not in done.stdout:
        pytest.skip("transformers does not take fla's function here")
    stopped = done.returncode and "torch._dynamo.exc.Unsupported" in done.stderr
    said = done.stdout + done.stderr[-2000:]
    assert stopped or "compiled 0" in done.stdout, f"fla's function was compiled: {said}"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # the compiler's advice
def test_a_patched_stack_compiles() -> None:
    """Whole sequences, without a graph break."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    engines = layers.make_engines(1, torch.device("cuda"), torch.bfloat16)
    x = torch.randn(1, 128, layers.WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = engines["transformers"].stack(x)
        torch._dynamo.reset()  # it skips a function that another test failed to compile
        for name in ("patched", "gdn.nn"):
            with engines[name].context():
                got = torch.compile(engines[name].stack, fullgraph=True)(x)
            assert relative_error(got, expected) <= TOLERANCE[torch.bfloat16]


def test_one_step_serves_batches_of_changing_slots(device: str) -> None:
    """A step of the example's model, captured in a CUDA graph, or compiled into one graph where
    there is no GPU: replays with other slots and tokens equal eager steps on a pool of their own,
    and padding rows touch nothing."""
    sys.path.append(str(Path(__file__).parent.parent / "examples"))
    small_model: Any = importlib.import_module("small_model")
    torch.manual_seed(0)
    model = small_model.Model(2, 32, 1, 2, 16, 16).to(device)
    pools, eager = model.make_pools(9), model.make_pools(9)
    tokens = torch.zeros(4, 1, dtype=torch.int64, device=device)
    slots = torch.full((4,), -1, dtype=torch.int32, device=device)
    if device == "cuda":
        model(tokens, pools, slots, {})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(tokens, pools, slots, {})

        def step() -> Tensor:
            graph.replay()
            return out
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

        def step() -> Tensor:
            return compiled(tokens, pools, slots, {})

    generator = torch.Generator().manual_seed(0)
    for n in range(6):
        chosen = torch.randperm(9, generator=generator)[:4].int()
        chosen[torch.rand(4, generator=generator) < 0.3] = -1
        slots.copy_(chosen)
        tokens.copy_(torch.randint(small_model.VOCABULARY, (4, 1), generator=generator))
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            got = step().clone()
        expected = model(tokens, eager, slots, {})
        assert torch.equal(got[slots >= 0], expected[slots >= 0])
    for one, other in zip(pools, eager, strict=True):
        assert relative_error(one, other) <= TOLERANCE[torch.float32]
        assert one.any()
