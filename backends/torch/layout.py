"""The tokens of chunk n of every sequence: slices in dense input, index tables in packed input."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gdn.problem import CHUNK, Call


class Layout(ABC):
    """The chunks of N sequences. Chunk n of all sequences is computed at once.

    `active[n]` is the number of sequences that have a chunk n. They are the first ones in the
    layout's order.
    """

    active: list[int]
    end: int | None = None

    @abstractmethod
    def gather(self, x: Tensor, n: int) -> Tensor:
        """[B, T, ...] -> [active[n], C, ...]: the tokens of chunk n."""

    @abstractmethod
    def scatter(self, out: Tensor, n: int, value: Tensor) -> None:
        """Store value [active[n], C, ...] as the tokens of chunk n of out [B, T, ...]."""

    def zero_padding(self, x: Tensor, n: int) -> Tensor:
        """x [active[n], C, ...] with zeros past the end of each sequence."""
        return x

    def zero_tail(self, x: Tensor) -> None:
        """Zero the tokens of x [B, T, ...] that belong to no sequence: those from `end` on."""
        if self.end is not None:
            x[:, self.end :] = 0

    def sort(self, state: Tensor) -> Tensor:
        """Rows of [N, ...] from the caller's order to this layout's."""
        return state

    def unsort(self, state: Tensor) -> Tensor:
        """Rows of [N, ...] from this layout's order to the caller's."""
        return state

    def count_rows(self, n: int) -> int:
        """Rows that the chunks before n take, one a sequence and chunk."""
        return sum(self.active[:n])


class Dense(Layout):
    """B sequences of T tokens. The last chunk has fewer than C tokens if T is no multiple of C."""

    def __init__(self, B: int, T: int) -> None:
        self.active = [B] * -(-T // CHUNK)

    def gather(self, x: Tensor, n: int) -> Tensor:
        return x[:, n * CHUNK : (n + 1) * CHUNK]

    def scatter(self, out: Tensor, n: int, value: Tensor) -> None:
        out[:, n * CHUNK : (n + 1) * CHUNK] = value


class Packed(Layout):
    """Sequences of any lengths along T, ordered from longest to shortest. Tokens past the last
    one's end belong to none."""

    def __init__(self, cu_seqlens: Tensor, device: torch.device) -> None:
        lengths, order = cu_seqlens.diff().sort(descending=True, stable=True)
        starts, self.end = cu_seqlens[:-1][order], int(cu_seqlens[-1])
        longest = int(lengths[0]) if len(lengths) else 0
        self.order, self.inverse = order.to(device), order.argsort().to(device)
        self.active, self.tokens, self.valid = [], [], []
        for first in range(0, longest, CHUNK):
            m = int((lengths > first).sum())
            offsets = torch.arange(first, first + CHUNK)
            valid = offsets < lengths[:m, None]  # [m, C]
            tokens = torch.where(valid, starts[:m, None] + offsets, 0)  # [m, C]
            self.active.append(m)
            self.tokens.append(tokens.to(device))
            self.valid.append(valid.to(device))

    def gather(self, x: Tensor, n: int) -> Tensor:
        return self.zero_padding(x[0, self.tokens[n]], n)

    def scatter(self, out: Tensor, n: int, value: Tensor) -> None:
        out[0, self.tokens[n][self.valid[n]]] = value[self.valid[n]].to(out.dtype)

    def zero_padding(self, x: Tensor, n: int) -> Tensor:
        # padding holds token 0, which may be NaN, so a product with zero would not do
        return x.masked_fill(~self.valid[n].reshape(*x.shape[:2], *[1] * (x.dim() - 2)), 0)

    def sort(self, state: Tensor) -> Tensor:
        return state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        return state[self.inverse]


def make_layout(call: Call) -> Layout:
    """The layout of a call. Packed lengths are read on the host, which synchronises with the device
    unless the call has cu_seqlens_cpu."""
    if call.cu_seqlens is None:
        return Dense(call.q.shape[0], call.q.shape[1])
    host = call.cu_seqlens.cpu() if call.cu_seqlens_cpu is None else call.cu_seqlens_cpu
    return Packed(host.long(), call.q.device)


def max_rows(call: Call) -> int:
    """An upper bound of the rows that all chunks take, from shapes alone."""
    if call.cu_seqlens is None:
        return call.q.shape[0] * -(-call.q.shape[1] // CHUNK)
    return call.q.shape[1] // CHUNK + call.sequences
