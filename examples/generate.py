"""Serve requests of different lengths with a small random model, and count tokens per second.

New requests are packed and prefilled together. All running requests take each decode step together;
their states lie in one pool per layer. A request that ends frees its slot for the next one
(continuous batching). Rows without a request get the null index, so a step's shapes never change.

    python examples/generate.py                       every backend that can run here
    python examples/generate.py --backends triton --requests 256 --slots 64
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import gdn

VOCABULARY = 512
FUSED = dict.fromkeys(
    ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True
)


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
        parts = self.in_proj(self.norm(x)).split(self.sizes, -1)
        names = ("q", "k", "v", "g", "beta")
        tensors = {n: p.unflatten(-1, s) for n, p, s in zip(names, parts, self.shapes, strict=True)}
        return tensors | {"A_log": self.A_log, "dt_bias": self.dt_bias}

    def forward(self, x: Tensor, pool: Tensor, slots: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Prefill packed sequences into their slots, or (no cu_seqlens) take a decode step."""
        if cu_seqlens is None:
            o = gdn.gated_delta_net_decode(
                **self.project(x), **FUSED, state=pool, state_indices=slots
            )
        else:
            o, state = gdn.gated_delta_net(
                **self.project(x), **FUSED, output_final_state=True, cu_seqlens=cu_seqlens
            )
            pool[slots] = state
        return x + self.out_proj(o.flatten(2))


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
        self, tokens: Tensor, pools: list[Tensor], slots: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The next token of each sequence by greedy decoding, [N]."""
        x = self.embed(tokens)
        for mixer, feed, pool in zip(self.mixers, self.feed, pools, strict=True):
            x = mixer(x, pool, slots, cu_seqlens)
            x = x + feed(x)
        last = x[:, -1] if cu_seqlens is None else x[0, cu_seqlens[1:] - 1]
        return F.linear(last, self.embed.weight).argmax(-1)


@dataclass
class Request:
    """A prompt, and the number of tokens to generate after it."""

    prompt: list[int]
    length: int
    written: list[int] = field(default_factory=list)


@dataclass
class Count:
    """Tokens and seconds of one kind of step."""

    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.tokens / max(self.seconds, 1e-9):.0f} a second"


def make_requests(number: int, prompt: int, length: int, seed: int = 0) -> list[Request]:
    """Requests with prompts of 1 to `prompt` tokens, to generate 1 to `length` tokens each."""
    generator = torch.Generator().manual_seed(seed)

    def upto(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    return [
        Request(torch.randint(VOCABULARY, (upto(prompt),), generator=generator).tolist(), n)
        for n in [upto(length) for _ in range(number)]
    ]


def serve(model: Model, requests: list[Request], slots: int) -> tuple[Count, Count]:
    """Serve all requests, at most `slots` at a time. Returns the counts of prefill and decode."""
    device = model.embed.weight.device
    pools, waiting = model.make_pools(slots), deque(requests)
    running: list[Request | None] = [None] * slots
    prefill, decode = Count(), Count()

    def step(count: Count, tokens: Tensor, *args: Tensor) -> list[int]:
        begin = time.perf_counter()
        written: list[int] = model(tokens.to(device), pools, *(x.to(device) for x in args)).tolist()
        count.seconds += time.perf_counter() - begin
        return written

    while waiting or any(running):
        free = [slot for slot, request in enumerate(running) if request is None]
        new = {slot: waiting.popleft() for slot in free if waiting}
        if new:
            prompts = [request.prompt for request in new.values()]
            ends = torch.tensor([0, *map(len, prompts)]).cumsum(0)
            packed = torch.tensor([list(chain(*prompts))])
            written = step(prefill, packed, torch.tensor([*new]), ends)
            prefill.tokens += int(ends[-1])
            for (slot, request), token in zip(new.items(), written, strict=True):
                request.written.append(token)
                running[slot] = request
        tokens = torch.tensor([[r.written[-1] if r else 0] for r in running])
        rows = [n if r and len(r.written) < r.length else -1 for n, r in enumerate(running)]
        if max(rows) >= 0:
            written = step(decode, tokens, torch.tensor(rows, dtype=torch.int32))
            decode.tokens += sum(row >= 0 for row in rows)
            for slot in (row for row in rows if row >= 0):
                running[slot].written.append(written[slot])  # type: ignore[union-attr]
        running = [r if r and len(r.written) < r.length else None for r in running]
    return prefill, decode


@torch.inference_mode()
def explain(model: Model) -> gdn.Explanation:
    """Which backends can run the model's decode steps."""
    inputs = model.mixers[0].project(model.embed.weight[None, :1])
    return gdn.explain(**inputs, **FUSED, state=model.make_pools(1)[0])


def main(arguments: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", help="a list; by default every one that can run here")
    parser.add_argument("--requests", type=int, default=128 if on_gpu else 16)
    parser.add_argument("--slots", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--prompt", type=int, default=2000 if on_gpu else 200, help="at most")
    parser.add_argument("--length", type=int, default=200 if on_gpu else 40, help="at most")
    parser.add_argument("--layers", type=int, default=4 if on_gpu else 2)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    heads = (16, 32, 128, 128) if on_gpu else (2, 4, 32, 32)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model = Model(args.layers, 2048 if on_gpu else 128, *heads).to(device, dtype).eval()
    shapes = (
        [(1, 1, heads[0], heads[2])] * 2 + [(1, 1, heads[1], heads[3])] + [(1, 1, heads[1])] * 2
    )
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    state = torch.empty(1, *model.state, device=device)
    able = [v.name for v in gdn.explain(*tensors, state=state).verdicts if not v.reasons]
    names = args.backends.split(",") if args.backends else able
    first: list[list[int]] | None = None
    with Progress(transient=True) as progress:
        for name in progress.track(names, description="serving"):
            with gdn.use_backend(name):
                serve(model, make_requests(args.slots, 70, 3), args.slots)  # warm up
                requests = make_requests(args.requests, args.prompt, args.length)
                counts = serve(model, requests, args.slots)
            written = [request.written for request in requests]
            first = first or written
            same = sum(a == b for a, b in zip(written, first, strict=True))
            progress.console.print(
                f"{name:>9}: prefill {counts[0]}; decode {counts[1]}; {same} of {len(written)} "
                f"requests as {names[0]} wrote them"
            )


if __name__ == "__main__":
    main()
