"""gdn and vLLM's own kernels on a layer's pool, as vLLM calls them after the short convolution:
prefill, packed decode, and verification of draft tokens, with the kernels that prepare them.

    python bench/vllm_kernels.py --heads 16/32 --backends tilelang,triton --json vllm.json

The Python files of vLLM 0.33 must be importable, with their metadata (vllm-0.33.0.dist-info); its
compiled kernels and its dependencies may be missing. A kernel that does not agree with plain
PyTorch is not timed. "triton" and "flashinfer" in the table are vLLM's kernels, gdn's are "gdn
...". vLLM has FlashInfer for prefill alone. Its fused CUDA kernel for verification, which includes
the gated norm, is not timed. `*` marks plain launches, gaps included.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from engines import DRAFTS, OWN, Comparison, Layer, NoKernel, Row, load, parse
from torch import Tensor

from gdn.integrations.vllm_batch import Rule, Tokens, run_batch
from gdn.problem import CHUNK
from gdn.testing.absent import stand_in

OPS = "vllm.third_party.flash_linear_attention.ops"
ABSENT = ("zmq", "urllib3", "psutil", "einops", "tqdm")
"""Packages of servers, which the import of vLLM's kernels imports."""
COMPILED = "vllm._C_stable_libtorch"
"""vLLM's compiled kernels, which its platform CUDA imports."""
WINDOW = 3
"""Tokens that the short convolution keeps; they lie before the state in a block of a pool."""


class Batch(NamedTuple):
    """The fields of vLLM's metadata that its layer and gdn read, and tokens."""

    metadata: Any
    tokens: Tokens


class Gdn:
    """gdn's calls in vLLM (`gdn.integrations.vllm_batch`)."""

    def __init__(self, layer: Layer, backend: str) -> None:
        options = {"backend": backend, **layer.gate}
        self.rule = Rule(layer.H, layer.HV, layer.K, layer.K, options)

    def run(self, batch: Batch, pool: Tensor, out: Tensor) -> None:
        run_batch(batch.metadata, batch.tokens, self.rule, _Convolved(), pool, out)

    prefill = decode = verify = run


class _Convolved:
    """The convolution of tokens that are convolved already."""

    def speculative(self, x: Tensor) -> Tensor:
        return x

    def others(self, x: Tensor) -> Tensor:
        return x


class Triton:
    """vLLM's Triton kernels, called as in its layer `QwenGatedDeltaNetAttention`."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.ops = layer, import_ops()
        self.heads = {
            "num_k_heads": layer.H, "head_k_dim": layer.K, "head_v_dim": layer.K,
        }  # fmt: skip

    def prefill(self, batch: Batch, pool: Tensor, out: Tensor) -> None:
        """One kernel makes q, k, v, decays and beta; states are gathered from the pool and go back
        to it."""
        metadata, (qkv, a, b, _) = batch
        prepared = self.ops.fused_post_conv_prep(
            conv_output=qkv, a=a, b=b, apply_l2norm=True, output_g_exp=False, **self.layer.gate,
            **self.heads,
        )  # fmt: skip
        slots = metadata.prefill_state_indices
        states = pool[slots]
        states[~metadata.prefill_has_initial_state] = 0
        o, states = self.chunked(metadata, states, *(x[None] for x in prepared))
        pool[slots] = states.to(pool.dtype)
        out.copy_(o[0])

    def chunked(self, metadata: Any, states: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
        """o and final states; tokens are q, k, v, the logarithm of the decay, and beta."""
        o, states = self.ops.chunk_gated_delta_rule(
            *tokens, initial_state=states, output_final_state=True,
            cu_seqlens=metadata.prefill_query_start_loc, chunk_indices=metadata.chunk_indices,
            chunk_offsets=metadata.chunk_offsets, use_qk_l2norm_in_kernel=False,
        )  # fmt: skip
        return o, states

    def decode(self, batch: Batch, pool: Tensor, out: Tensor) -> None:
        """One kernel."""
        metadata, (qkv, a, b, _) = batch
        self.ops.fused_recurrent_gated_delta_rule_packed_decode(
            mixed_qkv=qkv, a=a, b=b, scale=self.layer.K**-0.5, initial_state=pool,
            out=out[:, None], ssm_state_indices=metadata.non_spec_state_indices_tensor,
            use_qk_l2norm_in_kernel=True, **self.layer.gate,
        )  # fmt: skip

    def verify(self, batch: Batch, pool: Tensor, out: Tensor) -> None:
        """q, k and v are copied apart, in two steps; o is copied to its place."""
        metadata, (qkv, a, b, _) = batch
        parts = torch.split(qkv, self.layer.sizes, -1)
        joined = torch.cat([x.reshape(-1) for x in parts])
        apart = torch.split(joined, [x.numel() for x in parts])
        q, k, v = (x.view(1, len(qkv), -1, self.layer.K) for x in apart)
        o, _ = self.ops.fused_sigmoid_gating_delta_rule_update(
            a=a, b=b, q=q, k=k, v=v, initial_state=pool, inplace_final_state=True,
            cu_seqlens=metadata.spec_query_start_loc,
            ssm_state_indices=metadata.spec_state_indices_tensor,
            num_accepted_tokens=metadata.num_accepted_tokens, use_qk_l2norm_in_kernel=True,
            **self.layer.gate,
        )  # fmt: skip
        out.copy_(o[0])


class FlashInfer(Triton):
    """FlashInfer's prefill between vLLM's kernels, which is vLLM's choice on a Hopper GPU."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.rule = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule

    def chunked(self, metadata: Any, states: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
        """It takes the decay itself, and int64 bounds."""
        q, k, v, g, beta = (x[0] for x in tokens)
        o, states = self.rule(
            q=q, k=k, v=v, g=g.exp(), beta=beta, initial_state=states.float(),
            output_final_state=True, cu_seqlens=metadata.prefill_query_start_loc.long(),
            use_cp="auto", backend="flashinfer",
        )  # fmt: skip
        return o[None], states

    def decode(self, batch: Batch, pool: Tensor, out: Tensor) -> None:
        raise NoKernel

    verify = decode


def import_ops() -> Any:
    """vLLM's Gated DeltaNet ops; what else vLLM would import may be missing."""
    stand_in(*ABSENT)
    importlib.import_module("vllm")
    if COMPILED not in sys.modules and importlib.util.find_spec(COMPILED) is None:
        sys.modules[COMPILED] = ModuleType(COMPILED)
    ops = importlib.import_module(OPS)
    if not importlib.import_module("vllm.triton_utils").HAS_TRITON:
        raise RuntimeError("vLLM must find one Triton driver, got none; it needs a GPU")
    return ops


class Work:
    """What makes the rows of a layer, and the pools as vLLM lays them out."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def make_pool(self, slots: int) -> Tensor:
        """Random states [slots, HV, V, K] in float32, each behind the convolution's window in its
        block."""
        layer = self.layer
        window = WINDOW * sum(layer.sizes) * layer.dtype.itemsize // torch.float32.itemsize
        pages = torch.randn(slots, window + layer.HV * layer.K**2, device=layer.device) / 8
        return pages[:, window:].view(slots, layer.HV, layer.K, layer.K)

    def make_row(self, kind: str, N: int, columns: int, **fields: Any) -> Row:
        """The row of a batch with these fields of the metadata, besides slots."""
        T = fields["num_actual_tokens"]
        used = N * columns
        # block 0 belongs to no request
        slots = self.layer.slots(used, used + N) + 1
        none = {
            "num_prefills": 0, "num_decodes": 0, "num_decode_tokens": 0, "num_spec_decodes": 0,
            "checkpoint": None, "spec_sequence_masks": None, "prefill_state_indices": slots,
            "non_spec_state_indices_tensor": slots,
            "spec_state_indices_tensor": slots.view(N, columns),
        }  # fmt: skip
        qkv, a, b = self.layer.draw(T)
        batch = Batch(SimpleNamespace(**none | fields), Tokens(qkv, a, b))

        def call(kernel: Any, pool: Tensor) -> Tensor:
            out = qkv.new_empty(T, self.layer.HV, self.layer.K)
            getattr(kernel, kind)(batch, pool, out)
            return out

        return Row(call, lambda: self.make_pool(1 + used + N))

    def prefill(self, lengths: list[int]) -> Row:
        """Next parts of sequences that have states. vLLM makes the tables of chunks once a batch,
        for all layers."""
        N, at = len(lengths), self.layer.device
        chunks = [-(-n // CHUNK) for n in lengths]
        pairs = [(n, chunk) for n, count in enumerate(chunks) for chunk in range(count)]
        bounds = self.layer.bounds(lengths)
        return self.make_row(
            "prefill", N, 1, num_prefills=N, num_actual_tokens=sum(lengths),
            prefill_query_start_loc=bounds, non_spec_query_start_loc=bounds,
            prefill_has_initial_state=torch.ones(N, dtype=torch.bool, device=at),
            chunk_indices=torch.tensor(pairs, dtype=torch.int32, device=at),
            chunk_offsets=torch.tensor([0, *chunks], device=at).cumsum(0),
        )  # fmt: skip

    def decode(self, N: int) -> Row:
        """A token of each sequence."""
        return self.make_row(
            "decode", N, 1, num_decodes=N, num_decode_tokens=N, num_actual_tokens=N
        )

    def verify(self, N: int) -> Row:
        """`DRAFTS` tokens of each sequence, of whose last step 1 to `DRAFTS` were accepted."""
        at, T = self.layer.device, N * DRAFTS
        return self.make_row(
            "verify", N, DRAFTS, num_spec_decodes=N, num_actual_tokens=T,
            spec_sequence_masks=torch.ones(N, dtype=torch.bool, device=at),
            spec_query_start_loc=self.layer.bounds([DRAFTS] * N),
            num_accepted_tokens=(torch.arange(N, device=at) % DRAFTS + 1).int(),
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> Comparison:
    """Print the table, and the geometric mean of vLLM's Triton time over each other's."""
    args = parse((__doc__ or "").splitlines()[0], arguments)
    torch.manual_seed(0)
    layer = Layer(args.heads, args.size, args.device, torch.bfloat16)
    layer.gate["dt_bias"] = layer.gate["dt_bias"].to(layer.dtype)  # a parameter of the model
    kernels = load(
        {f"gdn {name}": lambda name=name: Gdn(layer, name) for name in args.backends.split(",")}
        | {OWN: lambda: Triton(layer), "flashinfer": lambda: FlashInfer(layer)}
    )
    comparison = Comparison("vLLM", "vllm", kernels, Gdn(layer, "torch"), layer)
    comparison.run(Work(layer), args)
    return comparison


if __name__ == "__main__":
    main()
