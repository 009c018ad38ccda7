"""Train a small model on sequences that lie on several processes (context parallelism).

Each process holds a part of the tokens of a batch, and the states pass between them. The sequences
hold keys with their values, then the same keys again, often on another process. The loss is that of
one process, up to rounding. Runs on CPUs (gloo); with GPUs each process takes the one of its local
rank (NCCL).

    torchrun --nproc-per-node 4 examples/train_long.py
    torchrun --nproc-per-node 1 examples/train_long.py     the same losses
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its defaults would keep the group and its threads
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import gdn


class Model(nn.Module):
    """An embedding, two layers of Gated DeltaNet, and logits."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        sizes = {"num_k_heads": 1, "num_v_heads": 2, "head_k_dim": 32, "head_v_dim": 32}
        self.mixers = nn.ModuleList(gdn.nn.GatedDeltaNet(width, **sizes) for _ in range(2))
        for mixer in self.mixers:
            nn.init.constant_(mixer.dt_bias, -4.0)  # else new gates decay within a few tokens
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.logits = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor, cp: gdn.ContextParallel) -> Tensor:
        x = self.embed(tokens)
        for mixer, norm in zip(self.mixers, self.norms, strict=False):
            x = x + mixer(norm(x), cp=cp)
        logits: Tensor = self.logits(self.norms[-1](x))
        return logits


def make_pack(
    sequences: int, pairs: int, names: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Packed tokens [1, sequences 4 pairs], and for each the token to predict, -100 for none.

    A sequence is `pairs` distinct keys, each followed by its value, then the same again. Predicted
    are the values of the second half."""
    keys = torch.rand(sequences, names, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(names, 2 * names, (sequences, pairs), generator=generator)
    half = torch.stack([keys, values], -1).flatten(1)
    wanted = torch.full((sequences, 4 * pairs), -100)
    wanted[:, 2 * pairs :: 2] = values
    return torch.cat([half, half], 1).view(1, -1), wanted.view(1, -1)


def train(args: argparse.Namespace, device: str) -> list[float]:
    """The loss of every step, the same on every process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Model(2 * args.names, args.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    length = 4 * args.pairs
    total = args.sequences * length
    edges = [total * r // ranks for r in range(ranks + 1)]
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    bounds = range(0, total + 1, length)
    cp = gdn.ContextParallel(dist.group.WORLD, bounds, lengths=lengths)
    own = slice(edges[rank], edges[rank + 1])
    losses = []
    bar = Progress(disable=rank > 0)
    with bar:
        for _ in bar.track(range(args.steps), description=f"{ranks} processes"):
            tokens, wanted = make_pack(args.sequences, args.pairs, args.names, generator)
            logits = model(tokens[:, own].to(device), cp)
            loss = F.cross_entropy(logits[0], wanted[0, own].to(device), reduction="sum")
            loss = loss / (args.sequences * args.pairs)
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():  # each rank has its share of the gradient
                dist.all_reduce(parameter.grad)
            optimizer.step()
            whole = loss.detach()
            dist.all_reduce(whole)
            losses.append(whole.item())
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sequences", type=int, default=32, help="sequences of a batch")
    parser.add_argument("--pairs", type=int, default=4, help="keys of a sequence")
    parser.add_argument("--names", type=int, default=8, help="different keys")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args(argv)
    gpus = torch.cuda.is_available()
    if gpus:  # before the group is made, which takes the current device
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
    dist.init_process_group("nccl" if gpus else "gloo")
    losses = train(args, "cuda" if gpus else "cpu")
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
