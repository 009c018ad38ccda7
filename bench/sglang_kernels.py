"""gdn's kernels and SGLang's own behind SGLang's interface: prefill on a pool, packed decode, and
verification of draft tokens, with the kernels that prepare them.

    python bench/sglang_kernels.py --heads 16/32 --backends tilelang,triton

SGLang 0.5.23 must be importable; its dependencies may be missing (docs/frameworks.md). A kernel
that does not agree with plain PyTorch is not timed. "triton" and "flashinfer" in the table are
SGLang's kernels, gdn's are "gdn ...". `*` marks plain launches, gaps included.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from engines import DRAFTS, OWN, Comparison, Layer, Row, load, parse
from torch import Tensor

from gdn.integrations.sglang_kernels import Kernel, split_projection
from gdn.testing.absent import stand_in

LINEAR = "sglang.srt.layers.attention.linear.kernels"
OPS = "sglang.kernels.ops.attention"
KERNELS = {OWN: "gdn_triton.TritonGDNKernel", "flashinfer": "gdn_flashinfer.FlashInferGDNKernel"}
"""SGLang's kernels."""


class Work:
    """What makes the rows of a layer."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def split(self, mixed: Tensor) -> list[Tensor]:
        """q, k, v [1, T, heads, K], by SGLang's kernel where SGLang uses it."""
        H, HV, K = self.layer.H, self.layer.HV, self.layer.K
        if mixed.is_cuda and sum(self.layer.sizes) <= 8192:
            fused = importlib.import_module(f"{OPS}.triton_gdn_fused_proj")
            return list(fused.fused_qkv_split_gdn_prefill(mixed, H, H, HV, K, K, K))
        return list(split_projection(mixed[None], HV, K, K))

    def places(self, lengths: list[int]) -> Callable[[Tensor], dict[str, Tensor]]:
        """The places of a batch in any pool; slots and bounds are made once."""
        slots = self.layer.slots(len(lengths), 2 * len(lengths))
        once = {"cache_indices": slots, "query_start_loc": self.layer.bounds(lengths)}
        return lambda pool: once | {"ssm_states": pool}

    def row(self, call: Callable[[Any, Tensor], Tensor], N: int) -> Row:
        """With twice as many slots as sequences."""
        layer = self.layer
        shape = (2 * N, layer.HV, layer.K, layer.K)
        return Row(call, lambda: torch.randn(shape, device=layer.device) / 8)

    def prefill(self, lengths: list[int]) -> Row:
        layer, place = self.layer, self.places(lengths)
        mixed, a, b = layer.draw(sum(lengths))
        gating = importlib.import_module(f"{OPS}.linear.fused_gdn_gating").fused_gdn_gating
        more = {"layer_id": 0, "extend_prefix_lens": torch.ones(len(lengths), device=layer.device)}

        def run(kernel: Any, pool: Tensor) -> Tensor:
            g, beta = gating(layer.gate["A_log"], a, b, layer.gate["dt_bias"])
            o: Tensor = kernel.extend(*self.split(mixed), g, beta, **place(pool), **more)[0]
            return o

        return self.row(run, len(lengths))

    def decode(self, N: int) -> Row:
        layer, place = self.layer, self.places([1] * N)
        mixed, a, b = layer.draw(N)
        sizes = {"scale": layer.K**-0.5, "num_v_heads": layer.HV, "head_v_dim": layer.K}

        def run(kernel: Any, pool: Tensor) -> Tensor:
            own = getattr(kernel, "packed_decode", None)
            if own is not None and getattr(kernel, "supports_packed_decode", True):
                o: Tensor = own(mixed, a, b, **layer.gate, **sizes, **place(pool))
            else:
                o = kernel.decode(*self.split(mixed), a, b, **layer.gate, **place(pool))
            return o

        return self.row(run, N)

    def verify(self, N: int) -> Row:
        layer, place = self.layer, self.places([DRAFTS] * N)
        mixed, a, b = layer.draw(N * DRAFTS)
        q_k_v = self.split(mixed)
        drafts = torch.zeros(N + 1, DRAFTS, layer.HV, layer.K, layer.K, device=layer.device)
        more = {
            "intermediate_states_buffer": drafts,
            "intermediate_state_indices": torch.arange(N, dtype=torch.int32, device=layer.device),
            "cache_steps": DRAFTS,
            "retrieve_parent_token": None,
        }

        def run(kernel: Any, pool: Tensor) -> Tensor:
            gate = layer.gate.values()
            o: Tensor = kernel.target_verify(*gate, *q_k_v, a, b, **place(pool), **more)
            return o

        return self.row(run, N)


def make_own(place: str) -> Any:
    """A kernel of SGLang, by its module and class."""
    module, _, kind = place.partition(".")
    return getattr(importlib.import_module(f"{LINEAR}.{module}"), kind)()


def main(arguments: list[str] | None = None) -> Comparison:
    """Print the table, and the geometric mean of SGLang's Triton time over each other's."""
    args = parse((__doc__ or "").splitlines()[0], arguments)
    torch.manual_seed(0)
    stand_in("torchvision", "sgl_kernel", "compressed_tensors", "gguf")
    layer = Layer(args.heads, args.size, args.device, torch.bfloat16)
    kernels = load(
        {f"gdn {name}": lambda name=name: Kernel(name) for name in args.backends.split(",")}
        | {name: lambda place=place: make_own(place) for name, place in KERNELS.items()}
    )
    comparison = Comparison("SGLang", "sglang", kernels, Kernel("torch"), layer)
    comparison.run(Work(layer), args)
    return comparison


if __name__ == "__main__":
    main()
