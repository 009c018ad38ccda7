"""`ContextParallel`: the process group and the split of the tokens of a call over its ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from gdn.token_split import Layout, Split, part_of, split


class ContextParallel:
    """Sequences split over the ranks of a process group, for `cp=` of `gdn.gated_delta_net`.

    Each rank passes its own tokens [1, T_local, ...] to the op. The result is that of the whole
    sequences on one rank; ranks exchange states, never tokens (docs/distributed.md).

    Args:
        group_or_mesh: a torch.distributed.ProcessGroup (NCCL or gloo) or a one-dimensional
            DeviceMesh.
        cu_seqlens: cumulative lengths [N + 1] of the sequences over all ranks, int32 or int64 or
            ints, the same on every rank; sequences may begin and end anywhere. None: one sequence.
            A tensor on a GPU is read here, once.
        layout: "contiguous": rank r holds the r-th part of the tokens. "zigzag": the tokens are 2 W
            parts for W ranks, and rank r holds parts r and 2 W - 1 - r, one behind the other. A
            rank with T_local tokens has (T_local + 1) // 2 in its first part.
        lengths: T_local of every rank, ints; some may be 0. None: the ranks exchange them in the
            first call, and a later call must have the same T_local.

    Raises:
        TypeError: group_or_mesh is neither a process group nor a mesh.
        ValueError: the mesh has several dimensions, layout is unknown, this process is not in the
            group, or cu_seqlens or lengths are malformed.

    All ranks make the object, and all call the op, in the same order and with the same options.
    """

    def __init__(
        self,
        group_or_mesh: Any,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        layout: Layout = "contiguous",
        lengths: Sequence[int] | None = None,
    ) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        group = group_or_mesh
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group_or_mesh must have one dimension, got {group.ndim}; "
                    "pass one of them, mesh['cp']"
                )
            group = group.get_group()
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "group_or_mesh must contain this process, got a group of others; "
                "only members make the object"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group_or_mesh must be a torch.distributed.ProcessGroup or a DeviceMesh, got "
                f"{type(group).__name__}; torch.distributed.group.WORLD is every process"
            )
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be 'contiguous' or 'zigzag', got {layout!r}")
        self.group, self.layout = group, layout
        self.rank, self.ranks = group.rank(), group.size()
        self.cu_seqlens = None if cu_seqlens is None else _as_bounds(cu_seqlens)
        self.lengths = None if lengths is None else _as_lengths(lengths, self.ranks)
        if self.lengths is not None:
            self._check_total(self.lengths)

    def __repr__(self) -> str:
        sequences = 1 if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return (
            f"ContextParallel(rank={self.rank}, ranks={self.ranks}, layout={self.layout!r}, "
            f"sequences={sequences}, lengths={self.lengths})"
        )

    @property
    def bounds(self) -> list[int]:
        """The cumulative lengths of all sequences, once lengths are known."""
        return [0, sum(self.lengths or ())] if self.cu_seqlens is None else self.cu_seqlens

    def _check_total(self, lengths: Sequence[int]) -> None:
        if self.cu_seqlens is not None and self.cu_seqlens[-1] != sum(lengths):
            raise ValueError(
                f"cu_seqlens of ContextParallel must end at the tokens of all ranks, "
                f"{sum(lengths)}, got {self.cu_seqlens[-1]}; they are global"
            )

    def for_tokens(self, x: Tensor) -> Placement:
        """The place of this rank, whose tokens are x [1, T_local, ...]. Exchanges the lengths if
        they are not known."""
        if self.lengths is None:
            if torch.compiler.is_compiling():
                raise ValueError(
                    "lengths of ContextParallel must be given under torch.compile, got None; "
                    "or call the op once before, outside it"
                )
            own = torch.tensor([x.shape[1]], dtype=torch.int64, device=x.device)
            found = start_all_gather(own, self.group.group_name, self.ranks)()
            lengths = found.flatten().tolist()
            self._check_total(lengths)
            self.lengths = lengths
        if x.shape[1] != self.lengths[self.rank]:
            raise ValueError(
                f"q must have T_local = {self.lengths[self.rank]} tokens on rank {self.rank} of "
                f"this ContextParallel, got {x.shape[1]}; make one for every set of lengths"
            )
        name = self.group.group_name
        return Placement(name, self.rank, self.layout, tuple(self.lengths), tuple(self.bounds))


class Placement(NamedTuple):
    """A ContextParallel as the last arguments of an operator (`SCHEMA`): plain values, so that
    graphs can hold them."""

    group: str
    rank: int
    layout: Layout
    lengths: tuple[int, ...]
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Placement:
        """From the arguments of an operator."""
        group, rank, layout, lengths, bounds = arguments[-len(cls._fields) :]
        return cls(group, rank, layout, tuple(lengths), tuple(bounds))

    @property
    def split(self) -> Split:
        """The share of this rank."""
        return _split(self)

    def place(self, number: int) -> tuple[int, int]:
        """`part_of` for this layout."""
        return part_of(number, len(self.lengths), self.layout)

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """A function that waits for the tensors of all ranks [ranks, ...], which are on their way
        from now on."""
        return start_all_gather(x, self.group, len(self.lengths))

    def all_gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks [ranks, ...]."""
        return self.start_all_gather(x)()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks."""
        import torch.distributed._functional_collectives  # fake kernels of the ops

        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", self.group))  # type: ignore[no-any-return]


SCHEMA = "str group, int rank, str layout, int[] lengths, int[] bounds"


@functools.lru_cache(maxsize=64)
def _split(placement: Placement) -> Split:
    return split(placement.rank, placement.lengths, placement.bounds, placement.layout)


def as_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Ints as int64 on a device, made once, since the layers of a model share them."""
    if torch._C._len_torch_dispatch_stack():  # a mode may make a fake tensor
        return torch.tensor(values, dtype=torch.int64, device=device)
    return _as_tensor(values, device)


@functools.lru_cache(maxsize=256)
def _as_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _as_ints(name: str, values: Tensor | Sequence[int]) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must be int32 or int64 and one-dimensional, got {values.dtype} "
                f"{tuple(values.shape)}"
            )
        return list(values.tolist())
    return [int(x) for x in values]


def _as_bounds(values: Tensor | Sequence[int]) -> list[int]:
    bounds = _as_ints("cu_seqlens", values)
    if not bounds or bounds[0] != 0 or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens must start at 0 and never descend, got {bounds}; "
            "it holds cumulative lengths over all ranks"
        )
    return bounds


def _as_lengths(values: Sequence[int], ranks: int) -> list[int]:
    lengths = _as_ints("lengths", values)
    if len(lengths) != ranks or min(lengths) < 0:
        raise ValueError(
            f"lengths must hold the tokens of each of {ranks} ranks, none below 0, got {lengths}"
        )
    return lengths


def start_all_gather(x: Tensor, group: str, ranks: int) -> Callable[[], Tensor]:
    """A function that waits for the tensors of all ranks [ranks, ...], by a functional
    collective."""
    import torch.distributed._functional_collectives  # fake kernels of the ops

    ops = torch.ops._c10d_functional
    coming = ops.all_gather_into_tensor(x.contiguous(), ranks, group)
    return lambda: ops.wait_tensor(coming).view(ranks, *x.shape)
