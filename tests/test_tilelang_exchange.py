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

from gdn.exchange import call_of_a_rank
from gdn.problem import Call
from gdn.testing import Case, make_inputs

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

from gdn.backends.tilelang import BACKEND
from gdn.backends.tilelang.forward.first_chunks import first_chunks
from gdn.backends.tilelang.forward.plan import ForwardPass
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
    found = torch.full((3, 3), -9, dtype=torch.int32)
    run(inputs["k"], inputs["g"], inputs["beta"], None, None, None, found, 1, 128)
    assert found.tolist() == FOUND[reverse]


def test_serialises_no_product_and_spills_nothing(tmp_path: Path) -> None:
    """The transfer scan, and the search for the first chunk that matters."""
    compiled = pytest.importorskip("test_tilelang")
    call = Call(**make_inputs(replace(CASE, T=2048), "meta"), context_parallel=True)
    jobs = ForwardPass(call).jobs(save=True)
    for kernel in compile_together(jobs[1], jobs[4]):
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
