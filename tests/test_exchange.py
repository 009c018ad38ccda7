"""One rank's part of a sequence on backends that exchange states between their scans, without other
ranks: the maps that they send, and what they make of the states that come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gdn.backends.common import chunking
from support import TOKENS
from torch import Tensor

import gdn
from gdn.backend import Backend
from gdn.distributed import pieces
from gdn.exchange import Exchange, ExchangingPlan, PieceMaps
from gdn.problem import Call
from gdn.registry import find_backend
from gdn.testing import TOLERANCE, Case, make_inputs, relative_error
from gdn.testing.inputs import make_output_gradients
from gdn.token_split import split

CASE = Case(
    "part", T=290, H=1, HV=2, K=128, V=128, dtype=torch.bfloat16, gates="weak", l2norm=True
)  # fmt: skip
CASES = [
    CASE,
    replace(CASE, name="float16", dtype=torch.float16, K=64, V=64, fused=True),
    replace(CASE, name="fast", gates="fast", l2norm=False),
    replace(CASE, name="channels", per_channel=True),
]
OPTIONS = (
    "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "A_log", "dt_bias", "allow_neg_eigval",
    "use_beta_sigmoid_in_kernel",
)  # fmt: skip


@pytest.fixture(autouse=True)
def pieces_of_two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "MIN_PIECE_CHUNKS", 2)


def check(backend: Backend, case: Case, device: str = "cpu") -> None:
    """o, gradients, and both maps, of the tokens between two other ranks', against the torch
    backend in float64."""
    inputs = make_inputs(case, device)
    S, (do, dS) = torch.randn(case.HV, case.K, case.V), make_output_gradients(case, device)
    S = S.to(device)
    own = {n: x for n, x in inputs.items() if n in (*TOKENS, *OPTIONS)}
    exact = {n: x.double() if torch.is_tensor(x) else x for n, x in own.items()}
    leaves = {n: x.requires_grad_() for n, x in exact.items() if torch.is_tensor(x)}
    exact["initial_state"] = leaves["initial_state"] = S[None].double().requires_grad_()
    want = gdn.gated_delta_net(**exact, output_final_state=True, backend="torch")
    loss = (want.o * do).sum()
    leaving = torch.autograd.grad(loss, leaves["initial_state"], retain_graph=True)[0][0]
    (loss + (want.final_state * dS).sum()).backward()  # type: ignore[operator]

    seen: list[PieceMaps] = []

    def receive(x: Tensor) -> Exchange:
        def exchange(maps: PieceMaps) -> Callable[[], Tensor]:
            seen.append(maps)
            return lambda: x

        return exchange

    scale = case.K**-0.5
    nothing = torch.full_like(S[None], torch.nan)
    call = Call(
        **own, initial_state=nothing, scale=scale, output_final_state=True, context_parallel=True
    )
    assert backend.exchanges(call)
    plan: Any = backend.plan(call)
    assert isinstance(plan, ExchangingPlan)
    o, final, _ = plan.forward_part(call, False, receive(S[None]))
    trained = plan.forward_part(call, True, receive(S[None]))
    call = call._replace(initial_state=S[None])
    found = plan.backward_part(call, trained.saved, do, receive(dS))

    T = case.tokens
    place = split(1, (9, T, 9), (0, T + 18), "contiguous")
    zero = torch.zeros_like(S[None])
    for maps in seen[:2]:
        if case.gates == "fast":  # no M is computed
            assert not maps.transfers[:, :, case.V :].any()
        N, M = pieces.right_edge(maps, place, 0, zero).split([case.V, case.K], -1)
        close("state", M @ S + N, want.final_state[0], case)  # type: ignore[index]
    close("N'", pieces.left_edge(seen[2], place, 0, zero), leaving, case)
    for got in ((o, final), trained[:2]):
        close("o", got[0], want.o, case)
        close("final_state", got[1], want.final_state, case)
    for name, x in found._asdict().items():
        if x is not None:
            close(name, x, leaves[name].grad, case)


def close(name: str, got: Any, want: Any, case: Case) -> None:
    assert relative_error(got.detach(), want.detach()) <= TOLERANCE[case.dtype], name


@pytest.mark.parametrize("gates", ["weak", "fast"])
def test_in_tritons_interpreter(gates: Any) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("not interpreted")
    sizes = {"H": 1, "HV": 1, "K": 64, "V": 64, "T": 140}
    check(find_backend("triton"), replace(CASE, **sizes, dtype=torch.float32, gates=gates))


FORGETTING = replace(CASE, T=286, H=1, HV=5, K=64, V=64, gates="none", l2norm=False)
FOUND = {
    False: [[1, 0, -1, 1, 0]] * 2 + [[-1] * 5],  # the first chunk that matters after a piece
    True: [[1, 2, 2, 2, 1]] * 2 + [[1] * 5],  # how many matter before it
}
"""For `forgetting_inputs`, two pieces of two chunks and a short one, and its heads."""


def forgetting_inputs(
    dtype: torch.dtype, case: Case = FORGETTING, length: float = 0.98
) -> dict[str, Tensor]:
    """Tokens of which one head forgets within a chunk, one within two, one not quite, one in every
    second chunk alone, and one in the others. length: of keys."""
    inputs = make_inputs(replace(case, dtype=dtype))
    second = torch.arange(case.tokens)[:, None] // 64 % 2
    decays = torch.tensor([-60.01 / 64, -60.01 / 128, -59.99 / 128, -60.01 / 64, -60.01 / 64])
    inputs["g"][:] = decays * torch.cat([torch.ones(case.tokens, 3), second, 1 - second], 1)
    inputs["beta"][:], inputs["k"] = 1.0, inputs["k"] * length
    return {name: inputs[name] for name in TOKENS}


def test_triton_finds_the_chunks_that_matter() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("not interpreted")
    for length, expected in ((0.98, FOUND), (3.0, {False: [[-1] * 5] * 3, True: [[2] * 5] * 2})):
        inputs = forgetting_inputs(torch.float32, length=length)
        call = Call(**inputs, initial_state=torch.zeros(1, 5, 64, 64), context_parallel=True)
        plan: Any = find_backend("triton").plan(call)
        factors = plan.new_saved[0]()
        prepare = plan.bind_forward(call, save=False)[0]
        matrices = plan.new_saved[1]()
        prepare(
            (*(inputs[n] for n in ("q", "k", "g", "beta")), None, None, factors, matrices, None),
            1.0,
        )
        for reverse, found in expected.items():
            got = plan.find_chunks(call, factors, reverse).view(3, 5).tolist()
            assert got[: len(found)] == found


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tilelang", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu(case: Case, backend: str) -> None:
    check(find_backend(backend), replace(case, T=1290, H=2, HV=4), "cuda")
