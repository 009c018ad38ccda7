"""Head sizes without kernels of their own, such as K = 96 and V = 192 or V = 256.

K is padded with zeros to 64 or 128, which changes no norm and no product. V is padded to a multiple
of 64 and divided into blocks. Kernels take the blocks of a value head as value heads of their own,
since columns of the state do not depend on each other. What a value head has once (g, beta, its
parameters) is repeated, and gradients of it are summed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.problem import Call

SIZES = (64, 128)
"""K and V that kernels have."""


class HeadBlocks(NamedTuple):
    """How a call's heads are laid out for kernels: K padded to `keys`, and V in
    `per_head` blocks of `values`."""

    K: int
    V: int
    keys: int
    values: int
    per_head: int

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros behind K and behind V."""
        return self.keys - self.K, self.values * self.per_head - self.V

    def describe(self) -> str:
        """In words, for `gdn.explain`."""
        words = [f"K padded to {self.keys}"] if self.keys != self.K else []
        words += [f"V in {self.per_head} blocks of {self.values}"] if self.per_head > 1 else []
        return ", ".join(words or [f"V padded to {self.values}"])

    def repeated(self, x: Tensor, heads: int, channels: bool) -> Tensor:
        """x with its dimension of value heads repeated for each block, and with padded channels of
        K if those are its last dimension."""
        x = F.pad(x, (0, self.padding[0])) if channels and self.padding[0] else x
        return x.repeat_interleave(self.per_head, heads) if self.per_head > 1 else x

    def summed(self, dx: Tensor, x: Tensor | None, heads: int) -> Tensor:
        """The gradient of x from that of `repeated`."""
        assert x is not None  # it has a gradient
        exact = torch.promote_types(dx.dtype, torch.float32)
        shape = (*x.shape[: heads + 1], self.per_head, *dx.shape[heads + 1 :])
        dx = dx.reshape(shape).sum(heads + 1, dtype=exact)
        return dx[..., : x.shape[-1]].to(x.dtype).contiguous()

    def padded_keys(self, x: Tensor) -> Tensor:
        """q or k with padded K."""
        return F.pad(x, (0, self.padding[0])) if self.padding[0] else x

    def to_blocks(self, x: Tensor) -> Tensor:
        """v or the gradient of o, [B, T, HV, V], as [B, T, HV per_head, values]."""
        x = F.pad(x, (0, self.padding[1])) if self.padding[1] else x
        return x.reshape(*x.shape[:2], -1, self.values)

    def joined(self, x: Tensor) -> Tensor:
        """[B, T, HV per_head, values] as [B, T, HV, V]."""
        x = x.reshape(*x.shape[:2], -1, self.per_head * self.values)
        return x[..., : self.V].contiguous()

    def block_states(self, S: Tensor | None, v_first: bool) -> Tensor | None:
        """States [N, HV, K, V] ([N, HV, V, K] if v_first) as [N, HV per_head, keys, values] (or
        with the last two swapped)."""
        if S is None:
            return None
        if any(self.padding):
            keys, values = self.padding
            S = F.pad(S, (0, keys, 0, values) if v_first else (0, values, 0, keys))
        N, HV = S.shape[:2]
        if v_first:
            return S.reshape(N, -1, self.values, self.keys)
        S = S.reshape(N, HV, self.keys, self.per_head, self.values).transpose(2, 3)
        return S.reshape(N, -1, self.keys, self.values)

    def joined_states(self, S: Tensor | None, v_first: bool) -> Tensor | None:
        """The inverse of `block_states`."""
        if S is None:
            return None
        N, width = S.shape[0], self.per_head * self.values
        if v_first:
            return S.reshape(N, -1, width, self.keys)[..., : self.V, : self.K].contiguous()
        S = S.reshape(N, -1, self.per_head, self.keys, self.values).transpose(2, 3)
        return S.reshape(N, -1, self.keys, width)[..., : self.K, : self.V].contiguous()

    def of(self, call: Call) -> Call:
        """The call as kernels take it."""
        channels, (A_log, dt_bias) = call.per_channel, (call.A_log, call.dt_bias)
        return call._replace(
            q=self.padded_keys(call.q), k=self.padded_keys(call.k), v=self.to_blocks(call.v),
            g=self.repeated(call.g, 2, channels), beta=self.repeated(call.beta, 2, False),
            A_log=None if A_log is None else self.repeated(A_log, 0, False),
            dt_bias=None if dt_bias is None else self.repeated(dt_bias, 0, channels),
            initial_state=self.block_states(call.initial_state, call.state_v_first),
        )  # fmt: skip


def choose_blocks(K: int, V: int) -> HeadBlocks | None:
    """The layout for heads of these sizes; None if kernels have them."""
    if K in SIZES and V in SIZES:
        return None
    keys = next(size for size in SIZES if size >= K)
    values = 64 if V % 128 in range(1, 65) else 128
    return HeadBlocks(K, V, keys, values, -(-V // values))
