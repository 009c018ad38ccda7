"""The model of generate.py: small, random, and all of Gated DeltaNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdn
from gdn.invariance import is_batch_invariant

VOCABULARY = 512
BLOCK = 64
"""Rows at a time in the batch-invariant mode."""
FUSED = dict.fromkeys(
    ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True
)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of each row of x. How PyTorch rounds depends on the number of rows, so in
    gdn.batch_invariant it is always the same."""
    if not is_batch_invariant():
        return function(x)
    rows = x.flatten(0, -2)
    blocks = F.pad(rows, (0, 0, 0, -len(rows) % BLOCK)).split(BLOCK)
    out = torch.cat([function(block) for block in blocks])
    return out[: len(rows)].unflatten(0, x.shape[:-1])


class Mixer(nn.Module):
    """Gated DeltaNet between two projections (real models put a short convolution before it)."""

    def __init__(self, width: int, H: int, HV: int, K: int, V: int) -> None:
        super().__init__()
        self.shapes = [(H, K), (H, K), (HV, V), (HV,), (HV,)]
        self.sizes = [H * K, H * K, HV * V, HV, HV]
        self.norm = nn.RMSNorm(width)
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(HV * V, width, bias=False)
        self.A_log = nn.Parameter(torch.rand(HV).log())
        self.dt_bias = nn.Parameter(torch.zeros(HV))

    def project(self, x: Tensor) -> dict[str, Tensor]:
        """The op's tensors from x [B, T, width]."""
        parts = by_rows(lambda rows: self.in_proj(self.norm(rows)), x).split(self.sizes, -1)
        names = ("q", "k", "v", "g", "beta")
        tensors = {n: p.unflatten(-1, s) for n, p, s in zip(names, parts, self.shapes, strict=True)}
        return tensors | {"A_log": self.A_log, "dt_bias": self.dt_bias}

    def forward(self, x: Tensor, pool: Tensor, slots: Tensor, options: dict[str, Tensor]) -> Tensor:
        """A decode step, or with cu_seqlens a prefill, into slots of the pool."""
        tensors = self.project(x) | FUSED
        if "cu_seqlens" not in options:
            o = gdn.gated_delta_net_decode(**tensors, **options, state=pool, state_indices=slots)
        elif "fresh" in options:
            o = gdn.gated_delta_net_prefill(**tensors, **options, state=pool, state_indices=slots)
        else:  # for backends that prefill outside of a pool alone
            o, state = gdn.gated_delta_net(**tensors, **options, output_final_state=True)
            pool[slots] = state
        return x + by_rows(self.out_proj, o.flatten(2))


class Model(nn.Module):
    """An embedding, mixers with an MLP after each, and logits by the same embedding."""

    def __init__(self, layers: int, width: int, H: int, HV: int, K: int, V: int) -> None:
        super().__init__()
        self.state = (HV, K, V)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.mixers = nn.ModuleList(Mixer(width, H, HV, K, V) for _ in range(layers))
        self.feed = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(layers)
        )

    def make_pools(self, slots: int) -> list[Tensor]:
        """One pool of states per layer, [slots, HV, K, V]."""
        device = self.embed.weight.device
        return [torch.zeros(slots, *self.state, device=device) for _ in self.mixers]

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, pools: list[Tensor], slots: Tensor, options: dict[str, Tensor]
    ) -> Tensor:
        """By greedy decoding: the token after each of a step's tokens [B, T], or with cu_seqlens
        after each packed sequence [N]."""
        x = self.embed(tokens)
        for mixer, feed, pool in zip(self.mixers, self.feed, pools, strict=True):
            x = mixer(x, pool, slots, options)
            x = x + by_rows(feed, x)
        if "cu_seqlens" in options:
            x = x[0, options["cu_seqlens"][1:] - 1]
        return by_rows(lambda rows: F.linear(rows, self.embed.weight), x).argmax(-1)


@torch.inference_mode()
def find_features(model: Model) -> dict[str, set[str]]:
    """What each backend can do of the model's calls: "steps", "prefixes", "drafts"."""
    inputs = model.mixers[0].project(model.embed.weight[None, :1]) | FUSED
    one = torch.zeros(1, dtype=torch.int32, device=model.embed.weight.device)
    checkpoint: dict[str, Any] = {"checkpoint_offsets": one, "checkpoint_indices": one}
    calls: dict[str, dict[str, Any]] = {
        "steps": {"state_indices": one},
        "drafts": {"state_indices": torch.stack([one, one + 1], 1)},
        "prefixes": {"prefill": True, "state_indices": one, **checkpoint},
    }
    found: dict[str, set[str]] = {}
    for feature, options in calls.items():
        shown = gdn.explain(**inputs, **options, state=model.make_pools(2)[0])
        for verdict in shown.verdicts:
            found.setdefault(verdict.name, set()).update(() if verdict.reasons else {feature})
    return found
