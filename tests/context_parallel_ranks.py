"""Context parallelism on the ranks of a group: what each process of
`test_context_parallel.py` runs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gdn.backends.common import chunking
from torch import Tensor

import gdn
from gdn.context_parallel import Placement
from gdn.distributed import passes
from gdn.problem import Call
from gdn.testing import TOLERANCE, Case, make_inputs, relative_error

TOKENS = ("q", "k", "v", "g", "beta")
PER_TOKEN = ("o", *(f"d_{name}" for name in TOKENS))
SHARES = ("d_initial_state", "d_A_log", "d_dt_bias")
"""Gradients whose sum over the ranks is that of the whole."""


@dataclass(frozen=True)
class Parallel:
    """A case: tokens of each rank, lengths of the sequences, and what kind of call it is."""

    name: str
    lengths: tuple[int, ...]
    sequences: tuple[int, ...] | None = None
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)
    final_state: bool = True
    silent: bool = False
    """No rank but the last one uses the final state in its loss."""

    @property
    def ranks(self) -> int:
        return len(self.lengths)

    def case(self, dtype: torch.dtype) -> Case:
        values = {"HV": 2, "H": 1, "K": 8, "V": 12, "dtype": dtype, "initial_state": True}
        whole = {"lengths": self.sequences} if self.sequences else {"T": sum(self.lengths)}
        return Case(self.name, **{**values, **whole, **self.options})

    def ranges(self) -> list[list[range]]:
        """The global tokens of every rank, in the order in which it holds them."""
        if self.layout == "contiguous":
            edges = itertools.accumulate(self.lengths, initial=0)
            return [[range(a, b)] for a, b in itertools.pairwise(edges)]
        early = [(n + 1) // 2 for n in self.lengths]
        late = [n // 2 for n in reversed(self.lengths)]
        edges = itertools.accumulate([*early, *late], initial=0)
        parts = [range(a, b) for a, b in itertools.pairwise(edges)]
        return [[parts[r], parts[-1 - r]] for r in range(self.ranks)]

    def bounds(self) -> list[int]:
        return [0, *itertools.accumulate(self.sequences or (sum(self.lengths),))]

    def sent(self, size: int, HV: int, K: int, V: int) -> list[tuple[str, int]]:
        """The collectives of a forward and a backward, and the bytes that a rank gives them
        (docs/distributed.md). size: bytes of a number."""
        parts = 2 if self.layout == "zigzag" else 1
        states = [("all_reduce", size * (len(self.bounds()) - 1) * HV * K * V)]
        states = states if self.final_state else []
        forward = ("all_gather", size * HV * K * (V + K) * parts)
        backward = ("all_gather", size * HV * K * V * parts)
        return [forward, *states, *states, backward]

    def owner(self, sequence: int) -> int:
        """The rank that holds the first token of a sequence, or of an empty one the next token."""
        token = self.bounds()[sequence]
        for rank, ranges in enumerate(self.ranges()):
            if any(token in tokens for tokens in ranges):
                return rank
        return 0 if self.layout == "zigzag" else self.ranks - 1


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """The collectives that run within it, and the bytes of what this rank gives them."""
    found: list[tuple[str, int]] = []

    def record(name: str) -> Callable[..., Any]:
        collective = getattr(Placement, name)

        def run(at: Placement, x: Tensor) -> Any:
            found.append((name.removeprefix("start_"), x.nbytes))
            return collective(at, x)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("start_all_gather", "all_reduce"):
            patch.setattr(Placement, name, record(name))
        yield found


def run_cases(
    rank: int,
    cases: Sequence[Parallel],
    dtypes: Sequence[torch.dtype],
    backend: str = "torch",
    device: str = "cpu",
) -> None:
    """Every case on a group of as many ranks as it asks for, among all of them. With torch also
    the layer on the case's split of tokens."""
    members = {2: [1, 3], 3: [0, 1, 3], 4: [0, 1, 2, 3]}
    if dist.get_world_size() == 2:
        members = {2: [0, 1]}
    groups = {n: dist.new_group(found) for n, found in members.items()}
    for case, dtype in itertools.product(cases, dtypes):
        if rank in members[case.ranks]:
            try:
                check(case, dtype, groups[case.ranks], backend, device)
                if backend == "torch" and dtype == torch.float64:
                    check_layer(case, groups[case.ranks])
            except Exception as error:
                raise AssertionError(f"{case.name}, {dtype}, rank {rank}") from error


def run_in_pieces(rank: int, *args: Any) -> None:
    """`run_cases` with pieces of one chunk, on a backend that exchanges between its scans. No
    further calls make the summaries where K is 64 or more."""

    def small(call: Call, *rest: Any) -> Tensor:
        assert call.q.shape[3] < 64
        return further_call(call, *rest)

    further_call = passes.initial_gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "MIN_PIECE_CHUNKS", 1)
        patch.setattr(passes, "initial_gradient", small)
        run_cases(rank, *args)


def check(
    case: Parallel, dtype: torch.dtype, group: Any, backend: str = "torch", device: str = "cpu"
) -> None:
    """One rank's outputs and gradients, twice, against those of the whole sequences in float64."""
    inputs = make_inputs(case.case(dtype))
    inputs["output_final_state"] = case.final_state
    inputs.pop("cu_seqlens", None)
    exact = {n: x.double() if torch.is_tensor(x) else x for n, x in inputs.items()}
    do, shares = loss_weights(case, exact)
    bounds = case.bounds()
    packed = torch.tensor(bounds) if case.sequences else None
    want = outputs(exact, do, sum(shares), "torch", cu_seqlens=packed)

    rank = dist.get_rank(group)
    own = [token for tokens in case.ranges()[rank] for token in tokens]
    mine = {n: x[:, own] if n in TOKENS else x for n, x in inputs.items()}
    if "initial_state" in mine:  # rows of other ranks are not read
        owned = torch.tensor([case.owner(n) == rank for n in range(len(bounds) - 1)])
        rows = mine["initial_state"]
        mine["initial_state"] = torch.where(owned[:, None, None, None], rows, torch.nan)
    mine = {n: x.to(device) if torch.is_tensor(x) else x for n, x in mine.items()}
    found = []
    for lengths in (None, case.lengths):
        cu_seqlens = bounds if case.sequences else None
        cp = gdn.ContextParallel(group, cu_seqlens, case.layout, lengths)
        with recorded() as sent:
            found.append(outputs(mine, do[:, own], shares[rank], backend, cp=cp))
        sizes = (*exact["v"].shape[2:3], exact["k"].shape[3], exact["v"].shape[3])
        assert sent == case.sent(8 if dtype == torch.float64 else 4, *sizes)
    assert found[0].keys() == want.keys()
    for name, got in found[0].items():
        assert torch.equal(got, found[1][name]), f"{name} differs from run to run"
        if name in SHARES:
            dist.all_reduce(got, group=group)
        wanted = want[name][:, own] if name in PER_TOKEN else want[name]
        try:
            compare(got.cpu(), wanted, dtype)
        except AssertionError as error:
            raise AssertionError(name) from error
    if "d_initial_state" in found[0]:
        assert not found[1]["d_initial_state"].cpu()[~owned].any(), "rows of others have gradients"


def compare(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """AssertionError unless they agree within what rounding to dtype costs."""
    if dtype.itemsize == 2:
        error = relative_error(got, want)
        assert not want.numel() or error <= TOLERANCE[dtype], f"relative RMS error {error:.2e}"
        return
    assert got.dtype == dtype
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, want.to(dtype), rtol=tolerance, atol=tolerance)


def check_layer(case: Parallel, group: Any) -> None:
    """One rank's part of `gdn.nn.GatedDeltaNet`, with its convolution, against the whole layer, in
    float64: y, and the gradients of x and of all parameters."""
    torch.manual_seed(0)
    layer = gdn.nn.GatedDeltaNet(
        8, num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=4, dtype=torch.float64
    )
    T, bounds = sum(case.lengths), torch.tensor(case.bounds())
    x, dy = torch.randn(2, 1, T, 8, dtype=torch.float64)
    own = [token for tokens in case.ranges()[dist.get_rank(group)] for token in tokens]
    cp = gdn.ContextParallel(group, bounds, case.layout)
    parts = 2 if case.layout == "zigzag" else 1
    halo = ("all_gather", (layer.conv_size - 1) * sum(layer.sizes) * x.itemsize * parts)
    states = replace(case, final_state=False).sent(x.itemsize, layer.HV, layer.K, layer.V)
    found = []
    for tokens, where in (
        (slice(None), {"cu_seqlens": bounds}),
        (own, {"cp": cp}),
        (own, {"cp": cp}),
    ):
        leaf = x[:, tokens].clone().requires_grad_()
        inputs = {"x": leaf, **dict(layer.named_parameters())}
        whole = "cp" not in where  # may have no tokens, and then skips its convolution
        leaves = list(inputs.values())
        with recorded() as sent:
            y = layer(leaf, **where)
            grads = torch.autograd.grad(y, leaves, dy[:, tokens], materialize_grads=whole)
        assert sent == ([] if whole else [halo, *states, halo])
        found.append({"y": y.detach(), **dict(zip(inputs, grads, strict=True))})
    want, got, again = found
    for name, value in got.items():
        assert torch.equal(value, again[name]), f"layer: {name} differs from run to run"
        if name in ("x", "y"):
            want[name] = want[name][:, own]
        else:
            dist.all_reduce(value, group=group)
        message = f"layer: {name}"
        # float32's, in which the layer's norm computes
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5, msg=message)


def loss_weights(case: Parallel, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the whole o, and of the final states on each rank."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / 8

    (HV, V), K = inputs["v"].shape[2:], inputs["k"].shape[3]
    state = (V, K) if inputs["state_v_first"] else (K, V)
    shares = [draw(len(case.bounds()) - 1, HV, *state) for _ in range(case.ranks)]
    if case.silent:
        shares = [torch.zeros_like(x) for x in shares[:-1]] + shares[-1:]
    return draw(*inputs["v"].shape), shares


def outputs(
    inputs: dict[str, Any],
    do: Tensor,
    dS: Tensor,
    backend: str,
    op: Callable[..., Any] = gdn.gated_delta_net,
    **options: Any,
) -> dict[str, Tensor]:
    """o, final_state and the gradients d_<name> of all inputs."""
    leaves = {
        n: x.detach().clone().requires_grad_() if torch.is_tensor(x) else x
        for n, x in inputs.items()
    }
    o, S = op(**leaves, **options, backend=backend)
    loss = (o * do.to(o)).sum()
    found = {"o": o.detach()}
    if S is not None:
        found["final_state"] = S.detach()
        if dS.any():
            loss = loss + (S * dS.to(S)).sum()
    loss.backward()
    gradients = {n: x.grad for n, x in leaves.items() if torch.is_tensor(x)}
    return found | {f"d_{n}": x for n, x in gradients.items() if x is not None}
