"""Packed calls whose sequences end before T: what lies past the end is padding, may hold anything,
and gets zeros in o and in every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import TOKENS, assert_close, poisoned_memory, require, truth  # noqa: F401

import gdn
from gdn.testing import Case, gradients, make_inputs, make_output_gradients, with_gradients

CASES = (
    Case("packed", lengths=(5, 70, 0, 64), HV=4, fused=True),
    Case("empty-sequences-last", lengths=(64, 3, 0, 0), state_v_first=True),
    Case("one-sequence", lengths=(130,), H=1, HV=3),
    Case("channels", lengths=(5, 70, 0), per_channel=True),
    Case("empty", lengths=(0, 0)),
    Case("none", lengths=()),
)
PIECES = Case("pieces", lengths=(330, 0, 200), H=1, HV=2)


def padded(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The inputs with more tokens, which are NaN."""
    more = {
        name: torch.cat([inputs[name], inputs[name].new_full((1, tokens, *tail), torch.nan)], 1)
        for name, tail in ((name, inputs[name].shape[2:]) for name in TOKENS)
    }
    return inputs | more


def check(backend: str, case: Case, device: str, tokens: int) -> None:
    inputs = with_gradients(padded(make_inputs(case, device), tokens))
    require(backend, inputs)
    o, state = gdn.gated_delta_net(**inputs, backend=backend)
    do, dS = make_output_gradients(case, device)
    do = torch.cat([do, do.new_full((1, tokens, *do.shape[2:]), torch.nan)], 1)
    found = {"o": o, "final_state": state} | gradients((o, state), inputs, (do, dS))
    for name, expected in truth(case).items():
        got = found[name].detach()
        if name in ("o", *TOKENS):
            assert not got[:, case.tokens :].any(), f"{name} is not zero past the end"
            got = got[:, : case.tokens]
        assert_close(name, got, expected, case.dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_past_the_end_are_padding(
    backend: str, device: str, dtype: torch.dtype, case: Case, tokens: int
) -> None:
    check(backend, replace(case, dtype=dtype), device, tokens)


@pytest.mark.usefixtures("poisoned_memory")
def test_where_sequences_are_cut_into_pieces(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, dtype: torch.dtype
) -> None:
    chunking = pytest.importorskip("gdn.backends.common.chunking")
    monkeypatch.setattr(chunking, "MIN_PIECE_CHUNKS", 1)
    monkeypatch.setattr(chunking, "sm_count", lambda device: 10**4)
    check(backend, replace(PIECES, dtype=dtype), device, 200)


@pytest.mark.gpu
def test_one_tensor_of_lengths_serves_other_ends(backend: str) -> None:
    """Its check on a GPU, once a tensor, does not ask where the sequences end."""
    case = Case("ends", lengths=(5, 70), HV=4, dtype=torch.bfloat16, initial_state=False)
    inputs = make_inputs(case, "cuda")
    require(backend, inputs)
    expected = gdn.gated_delta_net(**inputs, backend=backend)
    longer = padded(inputs, 33)
    with torch.cuda.device(0):
        got = gdn.gated_delta_net(**longer, backend=backend)
    torch.cuda.synchronize()
    assert torch.equal(got.final_state, expected.final_state)
    assert torch.equal(got.o[:, :75], expected.o)
    assert not got.o[:, 75:].any()
