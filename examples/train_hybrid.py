"""Train a hybrid language model of 98 million parameters with one backend after the other.

Three of four layers are Gated DeltaNet, the fourth is softmax attention. Each sequence walks along
a random Markov chain of its own, which the model learns from the sequence itself. Every backend
trains the same model from the same seed on the same batches: the loss curves should lie on each
other. No model has a lower loss than the exact predictor, which is printed too.

    python examples/train_hybrid.py --json curves.json --plot curves.png
    python examples/train_hybrid.py --runs fla.json tilelang.json --plot curves.png
                                                           of two runs with --backends and --json
    python examples/train_hybrid.py --backends torch --steps 200 --warmup 20 --lr 3e-3 \
        --width 64 --layers 4 --length 128 --tokens 8 --successors 2      small, on a CPU
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from markov import best_loss, make_chains
from rich.progress import Progress
from torch import Tensor, nn
from train_recall import plot

from gdn.compare.environment import environment
from gdn.nn import GatedDeltaNet

WINDOW = 50
"""Losses are compared averaged over this many steps, and read from the GPU once in as many."""


class Attention(nn.Module):
    """Causal softmax attention. It has no positions: the layers before it know the order."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.qkv, self.size = nn.Linear(width, 3 * width, bias=False), size
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, self.size).transpose(1, 3).unbind(2)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return y


class SwiGLU(nn.Module):
    """down(silu(gate) * up), three times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 6 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Model(nn.Module):
    """An embedding, layers with an MLP after each, and logits."""

    def __init__(self, tokens: int, width: int, layers: int, backend: str) -> None:
        super().__init__()
        size = min(128, width)
        heads = width // size
        self.embed = nn.Embedding(tokens, width)
        self.parts = nn.ModuleList()
        for layer in range(layers):
            mixer: Any = Attention(width, size)
            if layer % 4 < 3:
                mixer = GatedDeltaNet(
                    width, num_k_heads=heads, num_v_heads=heads,
                    head_k_dim=size, head_v_dim=size, backend=backend,
                )  # fmt: skip
                nn.init.constant_(mixer.dt_bias, -4.0)  # else new gates decay within a few tokens
            self.parts.extend([mixer, SwiGLU(width)])
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers + 1))
        self.logits = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for part, norm in zip(self.parts, self.norms, strict=False):
            x = x + part(norm(x))
        logits: Tensor = self.logits(self.norms[-1](x))
        return logits


def train(backend: str, args: argparse.Namespace, device: str, bar: Progress) -> dict[str, Any]:
    """The loss of every step, the median time of a step, and the peak of memory."""
    torch.manual_seed(args.seed)
    model = Model(args.tokens, args.width, args.layers, backend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min((n + 1) / args.warmup, (1 + math.cos(math.pi * n / args.steps)) / 2),
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    cuda = device == "cuda"
    half = torch.autocast(device, torch.bfloat16, enabled=cuda)
    losses: list[float] = []
    times = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    task = bar.add_task(backend, total=args.steps)
    while steps := min(WINDOW, args.steps - len(losses)):
        sizes = (steps * args.batch, args.length + 1, args.tokens, args.successors)
        chains, _ = make_chains(*sizes, generator)
        if cuda:
            torch.cuda.synchronize()  # times are without the data's
        start = time.perf_counter()
        block = []
        for batch in chains.split(args.batch):
            with half:
                logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            block.append(loss.detach())
        losses += torch.stack(block).tolist()
        times.append((time.perf_counter() - start) / steps)
        bar.update(task, completed=len(losses))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"losses": losses, "step_ms": 1e3 * statistics.median(times), "peak_gib": peak}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="fla,tilelang", help="the first is the reference")
    parser.add_argument("--width", type=int, default=768, help="a multiple of 128, or less")
    parser.add_argument("--lr", type=float, default=6e-4)
    numbers = {"steps": 2000, "warmup": 100, "batch": 4, "length": 2048, "layers": 12, "seed": 0}
    for name, default in (numbers | {"tokens": 64, "successors": 4}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[], metavar="FILE",
        help="what --json wrote with the same options: its backends are not trained again",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if args.runs and args.json:
        parser.error("--json is for runs of this machine, not for those of --runs")
    known: dict[str, Any] = {}
    for file in args.runs:
        known |= json.loads(file.read_text())["runs"]
    if wrong := [name for name, run in known.items() if len(run["losses"]) != args.steps]:
        parser.error(f"--runs must have {args.steps} steps, which {', '.join(wrong)} has not")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first, *others = args.backends.split(",")
    with torch.device("meta"):
        model = Model(args.tokens, args.width, args.layers, first)
    count = sum(p.numel() for p in model.parameters())
    sizes = (64, args.length + 1, args.tokens, args.successors)
    chains = make_chains(*sizes, torch.Generator(device).manual_seed(args.seed))
    best = best_loss(*chains, args.successors)
    print(f"{count:,} parameters; the exact predictor has a loss of {best:.4f}")
    runs, apart = {}, {}
    with Progress(transient=True) as bar:
        for name in (first, *others):
            runs[name] = run = known.get(name) or train(name, args, device, bar)
            difference = torch.tensor(run["losses"]) - torch.tensor(runs[first]["losses"])
            apart[name] = difference.unfold(0, min(WINDOW, args.steps), 1).mean(-1).tolist()
            text = f"{name:>9}: loss {statistics.mean(run['losses'][-100:]):.4f} at the end, "
            text += f"{run['step_ms']:.1f} ms a step"
            if run["peak_gib"]:
                text += f", {run['peak_gib']:.2f} GiB"
            if name != first:
                most = max(map(abs, apart[name]))
                text += f"; never more than {most:.4f} from the loss of {first}, both averaged"
            bar.console.print(text)
    if args.plot is not None:
        curves = {name: run["losses"] for name, run in runs.items()}
        curves["exact predictor"] = [best] * args.steps
        plot({"loss": curves, f"averaged loss minus that of {first}": apart}, args.plot)
    if args.json is not None:
        for run in runs.values():
            run["losses"] = [round(loss, 4) for loss in run["losses"]]
        report = environment(torch.device(device)) | {"parameters": count, "best_loss": best}
        args.json.write_text(json.dumps(report | {"runs": runs}) + "\n")


if __name__ == "__main__":
    main()
