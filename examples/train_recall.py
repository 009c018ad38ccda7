"""Train a small language model to recall the value of each key that it has seen before.

A sequence holds keys with their values, then the same keys in another order. The data are random.
Every backend trains the same model from the same seed on the same batches. The loss curves should
agree, and nearly every value should be recalled at the end. Exits with 1 if a backend misses that.

    python examples/train_recall.py                   every backend that can run here
    python examples/train_recall.py --gates channel   a decay per channel: Kimi Delta Attention
    python examples/train_recall.py --backends tilelang,triton --steps 500 --plot curves.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import gdn
from gdn.nn import GatedDeltaNet, GatedRMSNorm

SOLVED = 0.95
"""The task counts as solved if this share of values is recalled, on average over the last steps."""


class KimiDeltaAttention(nn.Module):
    """A layer with a decay for each channel of its keys: projections, a causal convolution, the op
    with L2 norm, gate and sigmoid fused, a gated norm, and a projection back."""

    def __init__(self, width: int, heads: int, size: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend, inner = heads, backend, heads * size
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.conv = nn.Conv1d(3 * inner, 3 * inner, 4, groups=3 * inner, padding=3, bias=False)
        self.gates = nn.Linear(width, 2 * inner, bias=False)  # of the state, and of the norm
        self.beta = nn.Linear(width, heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.full((heads, size), -4.0))
        self.norm = GatedRMSNorm(size)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.silu(self.conv(self.qkv(x).mT)[..., : x.shape[1]].mT)
        q, k, v = mixed.unflatten(-1, (3, self.heads, -1)).unbind(2)
        g, z = self.gates(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        o, _ = gdn.kimi_delta_attention(
            q, k, v, g, self.beta(x), A_log=self.A_log, dt_bias=self.dt_bias, backend=self.backend,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip
        y: Tensor = self.out(self.norm(o, z).flatten(2))
        return y


def make_mixer(width: int, gates: str, backend: str) -> nn.Module:
    """A layer with a decay per head, or per channel."""
    if gates == "channel":
        return KimiDeltaAttention(width, 2, 64, backend)
    mixer = GatedDeltaNet(
        width, num_k_heads=1, num_v_heads=2, head_k_dim=64, head_v_dim=64, backend=backend
    )
    nn.init.constant_(mixer.dt_bias, -4.0)  # else new gates decay within a few tokens
    return mixer


class Model(nn.Module):
    """An embedding, layers of the delta rule with an MLP after each, and logits."""

    def __init__(self, tokens: int, width: int, layers: int, gates: str, backend: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.mixers = nn.ModuleList(make_mixer(width, gates, backend) for _ in range(layers))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers + 1))
        self.logits = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        norms = iter(self.norms)
        for mixer, feed in zip(self.mixers, self.feed, strict=True):
            x = x + mixer(next(norms)(x))
            x = x + feed(next(norms)(x))
        logits: Tensor = self.logits(next(norms)(x))
        return logits


def make_batch(batch: int, pairs: int, names: int, generator: torch.Generator) -> Tensor:
    """Tokens [batch, 4 pairs]: `pairs` keys, each followed by its value, then the same in another
    order. Keys are tokens below `names`, values are tokens from `names` on. Keys are distinct."""
    keys = torch.rand(batch, names, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(names, 2 * names, (batch, pairs), generator=generator)
    order = torch.rand(batch, pairs, generator=generator).argsort(-1)
    queries, answers = keys.gather(1, order), values.gather(1, order)
    first = torch.stack([keys, values], -1).flatten(1)
    return torch.cat([first, torch.stack([queries, answers], -1).flatten(1)], 1)


def train(
    backend: str, args: argparse.Namespace, device: str, progress: Progress
) -> tuple[list[float], list[float]]:
    """The loss, and the share of values recalled, of every step."""
    torch.manual_seed(args.seed)
    model = Model(2 * args.names, args.width, args.layers, args.gates, backend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    losses, shares = [], []
    half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    for _ in progress.track(range(args.steps), description=backend):
        tokens = make_batch(args.batch, args.pairs, args.names, generator).to(device)
        with half:
            logits = model(tokens)[:, 2 * args.pairs :: 2]  # at the repeated keys
        answers = tokens[:, 2 * args.pairs + 1 :: 2]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        shares.append((logits.detach().argmax(-1) == answers).float().mean())
    return torch.stack(losses).tolist(), torch.stack(shares).tolist()


def able(device: str, gates: str = "head") -> list[str]:
    """The backends that can train here with a decay per head, or per channel."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads, channels = (2, (64,)) if gates == "channel" else (1, ())
    q, k, v = (torch.empty(1, 64, n, 64, dtype=dtype, device=device) for n in (heads, heads, 2))
    beta, g = (torch.empty(1, 64, 2, *sizes, device=device) for sizes in ((), channels))
    verdicts = gdn.explain(q.requires_grad_(), k, v, g, beta).verdicts
    return [verdict.name for verdict in verdicts if not verdict.reasons]


def plot(panels: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Plot curves over the steps: a panel for each label, in it a line for each name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for panel, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, curve in curves.items():
            panel.plot(curve, label=name, linewidth=1, alpha=0.8)
        panel.set(xlabel="step", ylabel=label)
        panel.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", help="a list; by default every one that can train here")
    parser.add_argument("--gates", choices=["head", "channel"], default="head")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=6, help="keys and values in a sequence")
    parser.add_argument("--names", type=int, default=16, help="different keys, and values")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = args.backends.split(",") if args.backends else able(device, args.gates)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    solved = True
    with Progress(transient=True) as progress:
        for name in names:
            curves[name] = train(name, args, device, progress)
            last = max(1, args.steps // 20)
            loss, share = (sum(curve[-last:]) / last for curve in curves[name])
            apart = max(
                abs(a - b) for a, b in zip(curves[name][0], curves[names[0]][0], strict=True)
            )
            progress.console.print(
                f"{name:>9}: loss {loss:.4f}, {100 * share:.1f} % of the values recalled; "
                f"never more than {apart:.3f} from the loss of {names[0]}"
            )
            solved &= share >= SOLVED
    if args.plot is not None:
        losses, shares = ({name: curves[name][i] for name in names} for i in (0, 1))
        plot({"loss": losses, "values recalled": shares}, args.plot)
    return 0 if solved else 1


if __name__ == "__main__":
    sys.exit(main())
