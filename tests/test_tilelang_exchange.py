"""`test_exchange.py` on TileLang's kernels in the emulator, and what ptxas says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hopper import emulate
from support import compile_together
from test_exchange import (
    CASE,
    CASES,
    FOUND,
    check,
    forgetting_inputs,
    pieces_of_two_chunks,  # noqa: F401
)

from gdn.definition import log_decay
from gdn.exchange import call_of_a_rank
from gdn.problem import Call
from gdn.testing import Case, make_inputs

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

from gdn.backends.tilelang import BACKEND
from gdn.backends.tilelang.forward.first_chunks import first_channel_chunks, first_chunks
from gdn.backends.tilelang.forward.plan import ForwardPass
from gdn.backends.tilelang.kernels import Job
from test_tilelang_emulated import Emulated, folder, world  # noqa: F401


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_emulated(world: Callable[..., None], case: Case) -> None:  # noqa: F811
    world(late=True)
    check(Emulated(), case)


@pytest.mark.parametrize("reverse", [False, True])
def test_finds_the_chunks_that_matter(folder: Path, reverse: bool) -> None:  # noqa: F811
    kernel = first_chunks(
        dtype="bfloat16", gates="float32", strengths="float32", offsets="int32", K=64,
        varlen=False, l2=False, gate=False, bias=False, sigmoid=False, double=False,
        reverse=reverse,
    )  # fmt: skip
    run = emulate(kernel, folder, late=False)
    inputs = forgetting_inputs(torch.bfloat16)
    found = torch.full((3, 5), -9, dtype=torch.int32)
    run(inputs["k"], inputs["g"], inputs["beta"], None, None, None, found, 1, 128)
    assert found.tolist() == FOUND[reverse]


@pytest.mark.parametrize(
    ("A_log", "bound", "l2"),
    [(True, None, False), (True, -5.0, True), (False, -5.0, False), (False, None, False)],
)
@pytest.mark.parametrize(
    ("dtype", "reverse"), [(torch.float32, False), (torch.bfloat16, True)], ids=["float32", "back"]
)
def test_finds_the_chunks_that_matter_per_channel(
    folder: Path,  # noqa: F811
    A_log: bool,
    bound: float | None,
    l2: bool,
    dtype: torch.dtype,
    reverse: bool,
) -> None:
    """With the gate fused (A_log, or a bound) or not, and long keys, in pieces of four chunks."""
    gate, HV, K, T = A_log or bound is not None, 4, 64, 600
    kernel = first_channel_chunks(
        dtype="bfloat16", gates=str(dtype).removeprefix("torch."), strengths="float32",
        offsets="int32", K=K, varlen=False, l2=l2, gate=gate, bias=gate, sigmoid=True, double=True,
        A_log=A_log, lower_bound=bound, reverse=reverse,
    )  # fmt: skip
    torch.manual_seed(0)
    k, beta = 0.2 * torch.randn(1, T, 1, K).bfloat16(), torch.randn(1, T, HV)
    bias, logarithms = torch.randn(HV, K), torch.randn(HV) if A_log else None
    decays = torch.tensor([-0.1, -0.4, -0.8, -4.0])[:, None].expand(1, T, HV, K)  # about
    g = (torch.randn(1, T, HV, K) + 6 * (decays + 1) if gate else decays).to(dtype).contiguous()
    exact = log_decay(g.float(), logarithms, bias, bound) if gate else g.float()
    squares = torch.ones(()) if l2 else k[0, :, 0].float().square().sum(-1)[:, None]
    growth = (1 - 2 * beta[0].sigmoid() * squares).abs().clamp(min=1).log()
    sums = (exact[0].amax(-1) + growth).clamp(min=-104)
    factors = torch.full((10, HV, 4, 64), torch.nan)
    for slot, tokens in enumerate(exact[0].split(64)):
        factors[slot, :, 3] = tokens.sum(0).exp()
    found = torch.full((3, HV), -9, dtype=torch.int32)
    run = emulate(kernel, folder, late=False)
    run(k, g, beta, logarithms, bias if gate else None, None, factors, found, 1, 256)
    expected = []
    for piece in sums.split(256):
        of_chunks = torch.stack([x.sum(0) for x in piece.split(64)])
        left = (of_chunks if reverse else of_chunks.flip(0)).cumsum(0).flip(0)
        chunks = torch.arange(len(left))[:, None]
        first = torch.where(left <= -60, chunks, -1).amax(0)
        expected.append(len(left) - first.clamp(min=0) if reverse else first)
    assert found.tolist() == torch.stack(expected).tolist()
    assert len(found.unique()) > 2


def test_serialises_no_product_and_spills_nothing(tmp_path: Path) -> None:
    """The transfer scan, and the search for the first chunk that matters."""
    compiled = pytest.importorskip("test_tilelang")
    jobs: list[Job] = []
    for case in (CASE, replace(CASE, per_channel=True, fused=True)):
        call = Call(**make_inputs(replace(case, T=2048), "meta"), context_parallel=True)
        jobs += ForwardPass(call).jobs(save=True)[1:3]  # the search, and the transfer scan
    for kernel in compile_together(*jobs):
        compiled.assert_compiles_well(kernel, tmp_path)


def test_warmup_compiles_the_kernels_of_a_ranks_call() -> None:
    """From given states and with a final one, whatever the call that is shown has."""
    case = Case("rank", T=4096, H=16, HV=32, K=128, V=128, dtype=torch.bfloat16)
    inputs = make_inputs(case, "meta") | {"initial_state": None, "output_final_state": False}
    call = call_of_a_rank(Call(**{"scale": 1.0} | inputs), BACKEND)
    names = [kernel.name for kernel, _ in BACKEND.jobs(call, True)]
    assert call.context_parallel
    assert names.count("first_chunks") == names.count("combine_pieces") == 2
    options = [x for kernel, x in BACKEND.jobs(call, True) if kernel.name == "scan"]
    assert [x["transfer"] for x in options] == [True, False]
