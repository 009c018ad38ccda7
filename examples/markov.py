"""The data of train_hybrid.py: sequences that walk along random Markov chains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_chains(
    sequences: int, length: int, tokens: int, successors: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens [sequences, length], and how many different ones each sequence may hold [sequences].

    A sequence holds from `successors` to `tokens` of all tokens. After each of them comes one of
    its own `successors`, with probabilities that are uniform on the simplex. Sequences of few
    tokens are easy to learn, so that a model's loss falls from the start; neighbours differ in
    their number, so that every batch has some of them."""
    own: dict[str, Any] = {"generator": generator, "device": generator.device}
    each = torch.arange(sequences, device=generator.device)
    spread = (each * 0.618034 + torch.rand(1, **own)) % 1  # the golden ratio: evenly over any few
    held = (successors * (tokens / successors) ** spread).round()
    ranks = torch.rand(sequences, tokens, **own).argsort(-1)
    weights = torch.rand(sequences, tokens, tokens, **own) * (ranks < held[:, None])[:, None]
    following = weights.topk(successors).indices
    shares = torch.empty(sequences, tokens, successors, device=generator.device)
    shares.exponential_(generator=generator)
    bounds = (shares.cumsum(-1) / shares.sum(-1, keepdim=True))[..., :-1]
    walk = [ranks.argmin(-1)]
    for draw in torch.rand(length - 1, sequences, 1, **own):
        choice = (bounds[each, walk[-1]] < draw).sum(-1)
        walk.append(following[each, walk[-1], choice])
    return torch.stack(walk, 1), held


def best_loss(chains: Tensor, held: Tensor, successors: int) -> float:
    """The mean loss of the exact predictor, which knows what `make_chains` draws from, and which
    tokens each sequence holds. No model has a lower one on average."""
    tokens = int(chains.max()) + 1
    counts = torch.zeros(chains.shape[0], tokens, tokens, device=chains.device)
    each = torch.arange(chains.shape[0], device=chains.device)
    total = torch.zeros((), device=chains.device)
    for now, then in zip(chains.T[:-1], chains.T[1:], strict=True):
        row = counts[each, now]
        found, seen = (row > 0).sum(-1), row[each, then]
        new = (successors - found) / (held - found)  # shared by all that were not seen yet
        total -= (torch.where(seen > 0, seen + 1, new) / (row.sum(-1) + successors)).log().mean()
        counts[each, now, then] += 1
    return total.item() / (chains.shape[1] - 1)
