"""Training in pieces: the chunks that the transfer scan and backward's first scan leave out, since
float32 does not see them, in the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import assert_close, run, truth
from test_exchange import FORGETTING, forgetting_inputs, pieces_of_two_chunks  # noqa: F401
from torch import Tensor

import gdn
from gdn.problem import Call
from gdn.registry import find_backend
from gdn.testing import TOLERANCE, Case, make_inputs, relative_error, with_gradients
from gdn.testing.inputs import gradients, make_output_gradients

pytest.importorskip("tilelang")
pytest.importorskip("test_tilelang_emulated")

from gdn.backends.tilelang import TileLangBackend
from test_tilelang_emulated import WORLDS, folder, world  # noqa: F401

PIECE = 128  # tokens, two chunks
CASE = replace(FORGETTING, T=420, dtype=torch.bfloat16)
PACKED: dict[str, Any] = {"T": 0, "lengths": (260, 0, 30, 400)}
CHANNELS = replace(CASE, per_channel=True)
FUSED = replace(CHANNELS, fused=True, gates="model", H=1, HV=2)


def make_tensors(case: Case = CASE) -> dict[str, Any]:
    """Heads forget as `forgetting_inputs` has it; per channel see `set_channels`. With fused gates
    they are the case's."""
    inputs = make_inputs(case)
    if case.per_channel and not case.fused:
        set_channels(inputs["g"])
    elif not case.per_channel:
        inputs |= forgetting_inputs(case.dtype, case)
    return inputs


def set_channels(g: Tensor) -> None:
    """One head forgets within a chunk. In one every channel decays by as much at every second
    token, but at none of them do all. In one a single channel does not quite. Two decay in every
    second chunk alone."""
    g[..., 0, :] = -60.01 / 64
    even, odd = g[:, ::2, 1], g[:, 1::2, 1]
    g[..., 1, :] = 0
    even[..., ::2] = odd[..., 1::2] = -1
    g[..., 2, :] = -3
    g[..., 2, 40] = -59.99 / PIECE
    second = (torch.arange(g.shape[1]) // 64 % 2)[:, None]
    g[..., 3, :] = -60.01 / 64 * second
    g[..., 4, :] = -60.01 / 64 * (1 - second)


@WORLDS
@pytest.mark.parametrize(
    "case",
    [CASE, replace(CASE, **PACKED), CHANNELS, replace(CHANNELS, **PACKED), FUSED],
    ids=["dense", "packed", "channels", "channels-packed", "fused"],
)
def test_agrees_with_the_definition(
    world: Callable[..., None],  # noqa: F811
    case: Case,
    late: bool,
) -> None:
    world(late)
    inputs = make_tensors(case)
    exact = run("torch", case, with_gradients(inputs, torch.float64))
    for name, value in run("emulated", case, with_gradients(inputs)).items():
        assert_close(name, value, exact[name], CASE.dtype)


def transfers_of(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """N^T and M^T of every piece and head, as a training forward leaves them."""
    call = Call(**{"scale": 1.0} | inputs)
    _, _, (*_, transfer, _) = find_backend("emulated").plan(call).forward(call, save=True)
    found: tuple[Tensor, Tensor] = transfer.split([CASE.V, CASE.K], 2)
    return found


@pytest.mark.parametrize(("case", "kept"), [(CASE, [0, 0, 1, 0, 0]), (CHANNELS, [0, 1, 1, 0, 0])])
def test_no_matrix_of_what_is_forgotten(
    world: Callable[..., None],  # noqa: F811
    case: Case,
    kept: list[int],
) -> None:
    world(late=False)
    _, M = transfers_of(make_tensors(case))
    assert M.flatten(2).any(-1).int().tolist() == [kept] * 3 + [[1] * 5]  # 36 tokens


def test_a_forgotten_initial_state_is_not_read(world: Callable[..., None]) -> None:  # noqa: F811
    """1e30 times e^-60 would be 9000."""
    world(late=False)
    inputs = make_tensors()
    N, _ = transfers_of(inputs)
    inputs["initial_state"] = inputs["initial_state"] + 1e30
    large, _ = transfers_of(inputs)
    same = [torch.equal(large[:, head], N[:, head]) for head in range(5)]
    assert same == [True, True, False, True, True]


def test_gradients_from_behind_a_piece_that_forgets(
    world: Callable[..., None],  # noqa: F811
) -> None:
    """A NaN in the second chunk of a piece, where only the first one matters to the gradient of its
    first state: heads that forget in the first one keep it from the piece before."""
    world(late=False)
    inputs, (do, dS) = with_gradients(make_tensors()), make_output_gradients(CASE)
    do[:, PIECE + 100] = torch.nan
    found = gradients(gdn.gated_delta_net(**inputs, backend="emulated"), inputs, (do, dS))
    spoiled = found["v"].isnan().any(-1)[0]  # [T, HV]
    reached = [False, True, True, True, False]
    assert spoiled[:PIECE].any(0).tolist() == reached
    assert spoiled[PIECE : PIECE + 100].all()
    assert found["initial_state"].isnan().flatten(2).any(-1).tolist() == [reached]


@pytest.mark.parametrize("case", [CASE, CHANNELS], ids=["heads", "channels"])
@pytest.mark.parametrize("name", ["g", "beta", "k"])
def test_nan_is_not_forgotten(
    world: Callable[..., None],  # noqa: F811
    case: Case,
    name: str,
) -> None:
    """Where a NaN is among the tokens that decide, of one channel too, nothing is left out."""
    world(late=False)
    inputs = make_tensors(case)
    token = inputs[name][:, PIECE - 2]
    (token[..., 5] if token.dim() == 3 else token)[:] = torch.nan
    _, M = transfers_of(inputs)
    assert M[0].flatten(1).any(-1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("gates", ["none", "weak", "mixed", "model", "fast", "strong"])
@pytest.mark.parametrize("lengths", [None, (1000, 3, 0, 597, 64)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_on_a_gpu(
    clean_registry: None, gates: Any, lengths: tuple[int, ...] | None, per_channel: bool
) -> None:
    gdn.register_backend(TileLangBackend(), replace=True)  # with plans of its own
    sizes: dict[str, Any] = {"T": 1664} if lengths is None else {"lengths": lengths}
    case = Case("pieces", **sizes, H=2, HV=4, K=128, V=128, gates=gates, l2norm=True)
    case = replace(case, dtype=torch.bfloat16, per_channel=per_channel)
    expected = truth(case)
    inputs = with_gradients(make_inputs(case, "cuda"))
    got = run("tilelang", case, inputs)
    for name, value in got.items():
        # not element by element: where little decays they are not of order 1
        assert relative_error(value, expected[name]) < TOLERANCE[case.dtype], name
    for name, value in run("tilelang", case, inputs).items():
        assert torch.equal(value, got[name])
