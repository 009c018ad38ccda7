"""gdn's kernels and SGLang's own behind SGLang's interface: prefill on a pool, packed decode, and
verification of draft tokens, with the kernels that prepare them.

    python bench/sglang_kernels.py --heads 16/32 --backends tilelang,triton

SGLang 0.5.23 must be importable; its dependencies may be missing (docs/frameworks.md). A kernel
that does not agree with plain PyTorch is not timed. "triton" and "flashinfer" in the table are
SGLang's kernels, gdn's are "gdn ...".
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from shapes import make_case
from torch import Tensor

from gdn.compare.timing import Timing, gpu_times, wall_times
from gdn.integrations.sglang_kernels import Kernel, split_projection
from gdn.testing import TOLERANCE, relative_error
from gdn.testing.absent import stand_in

LINEAR = "sglang.srt.layers.attention.linear.kernels"
OPS = "sglang.kernels.ops.attention"
OWN = {"triton": "gdn_triton.TritonGDNKernel", "flashinfer": "gdn_flashinfer.FlashInferGDNKernel"}
"""SGLang's kernels."""
PREFILLS = "1x512,1x2048,1x8192,8x1024,1024+7168,64x1-300"
DRAFTS = 4

Call = Callable[[Any, Tensor], Tensor]


class Layer:
    """Shapes, gate parameters and inputs of one layer."""

    def __init__(self, heads: str, K: int, device: torch.device, dtype: torch.dtype) -> None:
        self.H, self.HV = (int(x) for x in heads.split("/"))
        self.K, self.device, self.dtype = K, device, dtype
        self.sizes = [self.H * K, self.H * K, self.HV * K]
        self.gate = {name: torch.randn(self.HV, device=device) / 2 for name in ("A_log", "dt_bias")}

    def draw(self, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in one [T, 2 H K + HV V], and a and b [T, HV]."""
        widths = (sum(self.sizes), self.HV, self.HV)
        drawn = (torch.randn(T, n, device=self.device, dtype=self.dtype) for n in widths)
        return tuple(drawn)  # type: ignore[return-value]

    def split(self, mixed: Tensor) -> list[Tensor]:
        """q, k, v [1, T, heads, K], by SGLang's kernel where SGLang uses it."""
        if mixed.is_cuda and sum(self.sizes) <= 8192:
            fused = importlib.import_module(f"{OPS}.triton_gdn_fused_proj")
            heads = (self.H, self.H, self.HV, self.K, self.K, self.K)
            return list(fused.fused_qkv_split_gdn_prefill(mixed, *heads))
        return list(split_projection(mixed[None], self.HV, self.K, self.K))

    def make_place(self, lengths: list[int], pool: Tensor) -> dict[str, Tensor]:
        """Slots in no order, and bounds."""
        N, at = len(lengths), self.device
        bounds = torch.tensor([0, *lengths], device=at).cumsum(0).int()
        slots = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:N]
        return {"cache_indices": slots.int().to(at), "query_start_loc": bounds, "ssm_states": pool}


def make_pool(layer: Layer, N: int) -> Tensor:
    """Twice as many slots as sequences."""
    return torch.randn(2 * N, layer.HV, layer.K, layer.K, device=layer.device) / 8


def make_prefill(layer: Layer, lengths: list[int]) -> Call:
    mixed, a, b = layer.draw(sum(lengths))
    gating = importlib.import_module(f"{OPS}.linear.fused_gdn_gating").fused_gdn_gating
    more = {"layer_id": 0, "extend_prefix_lens": torch.ones(len(lengths), device=layer.device)}

    def run(kernel: Any, pool: Tensor) -> Tensor:
        g, beta = gating(layer.gate["A_log"], a, b, layer.gate["dt_bias"])
        o: Tensor = kernel.extend(*layer.split(mixed), g, beta, **place(pool), **more)[0]
        return o

    place = _places(layer, lengths)
    return run


def make_decode(layer: Layer, N: int) -> Call:
    mixed, a, b = layer.draw(N)
    sizes = {"scale": layer.K**-0.5, "num_v_heads": layer.HV, "head_v_dim": layer.K}
    place = _places(layer, [1] * N)

    def run(kernel: Any, pool: Tensor) -> Tensor:
        own = getattr(kernel, "packed_decode", None)
        if own is not None and getattr(kernel, "supports_packed_decode", True):
            o: Tensor = own(mixed, a, b, **layer.gate, **sizes, **place(pool))
        else:
            o = kernel.decode(*layer.split(mixed), a, b, **layer.gate, **place(pool))
        return o

    return run


def make_verify(layer: Layer, N: int) -> Call:
    mixed, a, b = layer.draw(N * DRAFTS)
    place, q_k_v = _places(layer, [DRAFTS] * N), layer.split(mixed)
    drafts = torch.zeros(N + 1, DRAFTS, layer.HV, layer.K, layer.K, device=layer.device)
    rows = torch.arange(N, dtype=torch.int32, device=layer.device)
    more = {
        "intermediate_states_buffer": drafts, "intermediate_state_indices": rows,
        "cache_steps": DRAFTS, "retrieve_parent_token": None,
    }  # fmt: skip

    def run(kernel: Any, pool: Tensor) -> Tensor:
        o: Tensor = kernel.target_verify(*layer.gate.values(), *q_k_v, a, b, **place(pool), **more)
        return o

    return run


def _places(layer: Layer, lengths: list[int]) -> Callable[[Tensor], dict[str, Tensor]]:
    """The places of a batch in any pool; slots and bounds are made once."""
    once = layer.make_place(lengths, torch.empty(2 * len(lengths)))
    return lambda pool: once | {"ssm_states": pool}


def load(names: list[str]) -> dict[str, Any]:
    """The kernels by name: gdn's backends and those of SGLang that this machine has."""
    stand_in("torchvision", "sgl_kernel", "compressed_tensors", "gguf")
    found: dict[str, Any] = {f"gdn {name}": Kernel(name) for name in names}
    for name, place in OWN.items():
        module, _, kind = place.partition(".")
        try:
            found[name] = getattr(importlib.import_module(f"{LINEAR}.{module}"), kind)()
        except Exception as error:  # another package's
            print(f"{name}: {type(error).__name__}: {error}")
    return found


def agreeing(kernels: dict[str, Any], call: Call, layer: Layer, N: int) -> dict[str, Any]:
    """The kernels whose output and pool are those of plain PyTorch."""
    pool, found = make_pool(layer, N), {}
    states = pool.clone()
    expected = call(Kernel("torch"), states)
    for name, kernel in kernels.items():
        after = pool.clone()
        try:
            o = call(kernel, after)
        except Exception as error:  # one kernel's must not stop the others
            print(f"  {name}: {type(error).__name__}: {error}")
            continue
        worst = max(relative_error(o, expected), relative_error(after, states))
        if worst <= TOLERANCE[layer.dtype]:
            found[name] = kernel
        else:
            print(f"  {name} is off by {worst:.1e}")
    return found


def measure(kernels: dict[str, Any], call: Call, layer: Layer, N: int) -> dict[str, Timing]:
    """The time of each kernel that agrees: GPU time with the L2 cache flushed, by plain launches
    where SGLang's kernel cannot be captured, or wall time on a CPU."""
    runs = {}
    for name, kernel in agreeing(kernels, call, layer, N).items():
        pool = make_pool(layer, N)
        runs[name] = lambda kernel=kernel, pool=pool: call(kernel, pool)
    if layer.device.type == "cuda":
        return gpu_times(runs, dict.fromkeys(runs, True))
    return wall_times(runs, layer.device, budget=0.1)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Timing]]:
    """Print the table, and the geometric mean of SGLang's Triton time over each other's. Returns
    the times by row and kernel."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="16/32", help="H/HV of a rank")
    parser.add_argument("--size", type=int, default=128, help="K = V")
    parser.add_argument("--backends", default="tilelang,triton" if on_gpu else "torch")
    parser.add_argument("--prefill", default=PREFILLS, help="shapes without heads")
    parser.add_argument("--batches", default="1,8,64,256", help="of decode and verification")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if on_gpu else "cpu")
    layer = Layer(args.heads, args.size, device, torch.bfloat16)
    kernels = load(args.backends.split(","))
    rows: dict[str, tuple[Call, int]] = {}
    for shape in args.prefill.split(","):
        case = make_case(f"{args.heads}:{shape}", "model", layer.dtype)
        lengths = list(case.lengths or [case.T] * case.B)
        rows[f"prefill {shape}"] = make_prefill(layer, lengths), len(lengths)
    for kind, make in (("decode", make_decode), ("verify", make_verify)):
        rows |= {f"{kind} {n}": (make(layer, int(n)), int(n)) for n in args.batches.split(",")}
    found = {}
    with torch.inference_mode():
        for row, (call, N) in rows.items():
            found[row] = measure(kernels, call, layer, N)
            cells = (f"{name} {t.ms:.4f} ms ({t.clock})" for name, t in found[row].items())
            print(row, *cells, sep=" | ")
    for kind in ("prefill", "decode", "verify"):
        for name in kernels:
            times = [
                t for row, t in found.items() if row.startswith(kind) and {name, "triton"} <= {*t}
            ]
            if times and name != "triton":
                mean = statistics.geometric_mean(t["triton"].ms / t[name].ms for t in times)
                print(f"{kind}: {name} is {mean:.2f} times as fast as SGLang's triton")
    return found


if __name__ == "__main__":
    main()
