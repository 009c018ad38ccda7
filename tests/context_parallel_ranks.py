"""Context parallelism on the ranks of a gloo group: what each process of
`test_context_parallel.py` runs."""

from __future__ import annotations

import datetime
import itertools
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import gdn
from gdn.testing import Case, make_inputs

LIMIT = 60.0
"""Seconds after which a collective gives up."""
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

    def owner(self, sequence: int) -> int:
        """The rank that holds the first token of a sequence, or of an empty one the next token."""
        token = self.bounds()[sequence]
        for rank, ranges in enumerate(self.ranges()):
            if any(token in tokens for tokens in ranges):
                return rank
        return 0 if self.layout == "zigzag" else self.ranks - 1


def start(run: Callable[..., None], ranks: int, folder: Path, limit: float, *args: Any) -> None:
    """Run `run(rank, *args)` in new processes of one gloo group. A rank that fails ends all.
    AssertionError with the tracebacks, or if they take longer than `limit` seconds."""
    context = mp.spawn(_enter, (run, ranks, folder, args), ranks, join=False)
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise AssertionError(f"the ranks did not end within {limit} s")
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        found = sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime_ns)
        raise AssertionError("\n".join(path.read_text() for path in found)) from error
    finally:
        for process in context.processes:
            process.kill()


def _enter(rank: int, run: Callable[..., None], ranks: int, folder: Path, args: Any) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=limit
    )
    try:
        run(rank, *args)
        dist.barrier()
    except Exception:
        (folder / f"failed-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    dist.destroy_process_group()


def fail_alone(rank: int) -> None:
    """Rank 1 raises; rank 0 waits for it in the op's exchange."""
    inputs = make_inputs(Case("alone", T=8 + rank))
    cp = gdn.ContextParallel(dist.group.WORLD, lengths=(8, 8))
    gdn.gated_delta_net(**inputs, cp=cp, backend="torch")


def run_cases(
    rank: int, cases: Sequence[Parallel], dtypes: Sequence[torch.dtype], backend: str = "torch"
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
                check(case, dtype, groups[case.ranks], backend)
                if backend == "torch" and dtype == torch.float64:
                    check_layer(case, groups[case.ranks])
            except Exception as error:
                raise AssertionError(f"{case.name}, {dtype}, rank {rank}") from error


def check(case: Parallel, dtype: torch.dtype, group: Any, backend: str = "torch") -> None:
    """One rank's outputs and gradients, twice, against those of the whole sequences in float64."""
    exact = make_inputs(case.case(torch.float64))
    exact["output_final_state"] = case.final_state
    exact.pop("cu_seqlens", None)
    do, shares = loss_weights(case, exact)
    bounds = case.bounds()
    packed = torch.tensor(bounds) if case.sequences else None
    want = outputs(exact, do, sum(shares), "torch", cu_seqlens=packed)

    rank = dist.get_rank(group)
    own = [token for tokens in case.ranges()[rank] for token in tokens]
    mine = {n: x[:, own] if n in TOKENS else x for n, x in exact.items()}
    if "initial_state" in mine:  # rows of other ranks are not read
        owned = torch.tensor([case.owner(n) == rank for n in range(len(bounds) - 1)])
        rows = mine["initial_state"]
        mine["initial_state"] = torch.where(owned[:, None, None, None], rows, torch.nan)
    mine = {n: x.to(dtype) if torch.is_tensor(x) else x for n, x in mine.items()}
    found = []
    for lengths in (None, case.lengths):
        cu_seqlens = bounds if case.sequences else None
        cp = gdn.ContextParallel(group, cu_seqlens, case.layout, lengths)
        found.append(outputs(mine, do[:, own], shares[rank], backend, cp=cp))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    assert found[0].keys() == want.keys()
    for name, got in found[0].items():
        assert got.dtype == dtype, name
        assert torch.equal(got, found[1][name]), f"{name} differs from run to run"
        if name in SHARES:
            dist.all_reduce(got, group=group)
        wanted = want[name][:, own] if name in PER_TOKEN else want[name]
        try:
            torch.testing.assert_close(got, wanted.to(dtype), rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            raise AssertionError(name) from error
    if "d_initial_state" in found[0]:
        assert not found[1]["d_initial_state"][~owned].any(), "rows of others have gradients"


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
    found = []
    for tokens, where in (
        (slice(None), {"cu_seqlens": bounds}),
        (own, {"cp": cp}),
        (own, {"cp": cp}),
    ):
        leaf = x[:, tokens].clone().requires_grad_()
        y = layer(leaf, **where)
        inputs = {"x": leaf, **dict(layer.named_parameters())}
        whole = "cp" not in where  # may have no tokens, and then skips its convolution
        leaves = list(inputs.values())
        grads = torch.autograd.grad(y, leaves, dy[:, tokens], materialize_grads=whole)
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


def compile_agrees(rank: int) -> None:
    """One graph, forward and backward, with the bits of the eager call."""
    case = Parallel("compiled", (5, 9), (3, 8, 0, 3), options={"fused": True})
    inputs = make_inputs(case.case(torch.float32))
    inputs.pop("cu_seqlens")
    own = [token for tokens in case.ranges()[rank] for token in tokens]
    mine = {n: x[:, own] if n in TOKENS else x for n, x in inputs.items()}
    cp = gdn.ContextParallel(dist.group.WORLD, case.bounds(), lengths=case.lengths)
    do, shares = loss_weights(case, inputs)
    eager = outputs(mine, do[:, own], shares[rank], "torch", cp=cp)
    op = torch.compile(gdn.gated_delta_net, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second call finds what the first one compiled
        got = outputs(mine, do[:, own], shares[rank], "torch", op, cp=cp)
        assert got.keys() == eager.keys()
        assert all(torch.equal(x, eager[n]) for n, x in got.items())
        torch._dynamo.config.error_on_recompile = True


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
