"""Which tokens make up chunk n of every sequence that still has one: slices if dense, index tables
if packed."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gdn.problem import CHUNK, Call


class Layout(ABC):
    """Walks N sequences chunk by chunk, all in step. `active[n]` sequences have a chunk n; they
    come first."""

    active: list[int]

    @abstractmethod
    def take(self, x: Tensor, n: int) -> Tensor:
        """[B, T, ...] -> [active[n], C, ...]: the tokens of chunk n."""

    @abstractmethod
    def put(self, out: Tensor, n: int, value: Tensor) -> None:
        """Store value [active[n], C, ...] as the tokens of chunk n of out [B, T, ...]."""

    def blank(self, x: Tensor, n: int) -> Tensor:
        """Zero the tokens of x [active[n], C, ...] that lie past the end of their sequence."""
        return x

    def sort(self, state: Tensor) -> Tensor:
        """Rows of [N, ...] in the order of this layout."""
        return state

    def unsort(self, state: Tensor) -> Tensor:
        """Rows of [N, ...] back in the caller's order."""
        return state

    def row(self, n: int) -> int:
        """Rows used by the chunks before n, counting one a sequence and chunk."""
        return sum(self.active[:n])


class Dense(Layout):
    """B sequences of T tokens."""

    def __init__(self, B: int, T: int) -> None:
        self.active = [B] * -(-T // CHUNK)

    def take(self, x: Tensor, n: int) -> Tensor:
        return x[:, n * CHUNK : (n + 1) * CHUNK]

    def put(self, out: Tensor, n: int, value: Tensor) -> None:
        out[:, n * CHUNK : (n + 1) * CHUNK] = value


class Packed(Layout):
    """Sequences of any lengths along one row, longest first, so that the active ones are a
    prefix."""

    def __init__(self, cu_seqlens: Tensor, device: torch.device) -> None:
        lengths, order = cu_seqlens.diff().sort(descending=True, stable=True)
        starts = cu_seqlens[:-1][order]
        longest = int(lengths[0]) if len(lengths) else 0
        self.order, self.inverse = order.to(device), order.argsort().to(device)
        self.active, self.tokens, self.valid = [], [], []
        for first in range(0, longest, CHUNK):
            m = int((lengths > first).sum())
            offsets = torch.arange(first, first + CHUNK)
            valid = offsets < lengths[:m, None]
            tokens = torch.where(valid, starts[:m, None] + offsets, 0)
            self.active.append(m)
            self.tokens.append(tokens.to(device))
            self.valid.append(valid.to(device))

    def take(self, x: Tensor, n: int) -> Tensor:
        return self.blank(x[0, self.tokens[n]], n)

    def put(self, out: Tensor, n: int, value: Tensor) -> None:
        out[0, self.tokens[n][self.valid[n]]] = value[self.valid[n]].to(out.dtype)

    def blank(self, x: Tensor, n: int) -> Tensor:
        # masked_fill, not a product: a NaN of another sequence may have been gathered
        return x.masked_fill(~self.valid[n].reshape(*x.shape[:2], *[1] * (x.dim() - 2)), 0)

    def sort(self, state: Tensor) -> Tensor:
        return state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        return state[self.inverse]


def make_layout(call: Call) -> Layout:
    """The layout of a call. Packed lengths are read on the host (a device sync unless
    cu_seqlens_cpu is given)."""
    if call.cu_seqlens is None:
        return Dense(call.q.shape[0], call.q.shape[1])
    host = call.cu_seqlens.cpu() if call.cu_seqlens_cpu is None else call.cu_seqlens_cpu
    return Packed(host.long(), call.q.device)


def max_rows(call: Call) -> int:
    """An upper bound, from shapes alone, on the chunks of all sequences together."""
    if call.cu_seqlens is None:
        return call.q.shape[0] * -(-call.q.shape[1] // CHUNK)
    return call.q.shape[1] // CHUNK + call.sequences
