"""Prefill on a pool of states: every backend against the definition, and the rules of the pool."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import TOKENS, assert_close, capabilities_of, poisoned_memory, require  # noqa: F401

import gdn
from gdn.testing.check import assert_prefill_agrees
from gdn.testing.decode import copy_pool
from gdn.testing.prefill import PREFILLS, PrefillCase, as_prefill, make_prefill

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = PrefillCase("short", lengths=(70, 3, 0, 64), HV=4, fused=True, fresh=True, tail=5)
STORED = replace(SHORT, checkpoints="pool", columns=2)


@pytest.fixture
def short(dtype: torch.dtype) -> PrefillCase:
    """A case of all kinds of sequences, in the most precise dtype that the backend claims."""
    return replace(SHORT, dtype=dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", PREFILLS, ids=lambda case: case.name)
def test_agrees_with_the_definition(
    backend: str, device: str, case: PrefillCase, dtype: torch.dtype
) -> None:
    """o, every named slot and every checkpoint agree. All other slots hold NaN before and keep
    their bits."""
    case = replace(case, dtype=dtype)
    inputs = make_prefill(case, device, poison=True)
    require(backend, inputs, prefill=True)
    assert_prefill_agrees(backend, case, inputs)


def test_parts_chained_by_the_pool_equal_one_call(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    """And what `gated_delta_net` computes from the same states."""
    case = PrefillCase("parts", B=2, T=200, HV=4, own=True, dtype=dtype)
    inputs = make_prefill(case, device)
    require(backend, inputs, prefill=True)
    again = inputs | {"state": copy_pool(inputs["state"])}
    options = {n: x for n, x in inputs.items() if n not in ("state", "null_index")}
    whole = gdn.gated_delta_net(
        **options, initial_state=inputs["state"].clone(), output_final_state=True, backend=backend
    )
    o = gdn.gated_delta_net_prefill(**inputs, backend=backend)
    parts = [
        gdn.gated_delta_net_prefill(
            **again | {n: again[n][:, a:b] for n in TOKENS}, backend=backend
        )
        for a, b in ((0, 64), (64, 199), (199, 200))
    ]
    assert_close("o", o, whole.o, dtype)
    assert_close("state", inputs["state"], whole.final_state, dtype)
    assert_close("parts", torch.cat(parts, 1), o, dtype)
    assert_close("state of parts", again["state"], inputs["state"], dtype)


def test_a_checkpoint_is_the_state_after_a_shorter_call(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    case = PrefillCase("checkpoint", B=2, T=190, checkpoints="buffer", columns=2, dtype=dtype)
    inputs = make_prefill(case, device)
    require(backend, inputs, prefill=True)
    short = inputs | {n: inputs[n][:, :128] for n in TOKENS}
    short |= {"state": copy_pool(inputs["state"]), "checkpoints": None, "checkpoint_offsets": None}
    gdn.gated_delta_net_prefill(**inputs, backend=backend)
    gdn.gated_delta_net_prefill(**short, backend=backend)
    slots = inputs["state_indices"].long()
    live = slots < len(inputs["state"])
    assert_close("state", inputs["checkpoints"][live, 1], short["state"][slots[live]], dtype)


def test_slices_of_one_tensor_give_the_same(backend: str, device: str, short: PrefillCase) -> None:
    """q, k, v are parts of one projection, g and beta of another; tables have strides."""
    inputs, again = make_prefill(short, device), make_prefill(short, device)
    require(backend, inputs, prefill=True)
    B, T = inputs["q"].shape[:2]
    parts = [inputs[name].reshape(B, T, -1) for name in ("q", "k", "v")]
    mixed = torch.cat(parts, -1).split([x.shape[-1] for x in parts], -1)
    again |= {n: x.view(inputs[n].shape) for n, x in zip(("q", "k", "v"), mixed, strict=True)}
    again |= dict(
        zip(("g", "beta"), torch.stack([inputs["g"], inputs["beta"]], 2).unbind(2), strict=True)
    )
    table = torch.stack([inputs["state_indices"].long() * 0 + 10**6, inputs["state_indices"]], 1)
    again["state_indices"] = table[:, 1]
    expected = gdn.gated_delta_net_prefill(**inputs, backend=backend)
    copies = {n: again[n].clone() for n in (*TOKENS, "state_indices")}
    assert torch.equal(gdn.gated_delta_net_prefill(**again, backend=backend), expected)
    assert torch.equal(again["state"], inputs["state"])
    for name, x in copies.items():  # only the pool is written to
        assert torch.equal(again[name].nan_to_num(7), x.nan_to_num(7))


def test_parameters_of_another_dtype_and_an_output_anywhere(
    backend: str, device: str, short: PrefillCase
) -> None:
    """A_log and dt_bias in bfloat16 beside a pool in bfloat16; `out` one number off an address that
    is a multiple of 16 bytes."""
    inputs = make_prefill(replace(short, pool=torch.bfloat16), device)
    require(backend, inputs, prefill=True)
    rounded = {n: inputs[n].bfloat16() for n in ("A_log", "dt_bias")}
    shape = inputs["v"].shape
    wide = inputs["v"].new_full((inputs["v"].numel() + 1,), 7)
    found = []
    for changes in (
        {n: x.float() for n, x in rounded.items()} | {"out": wide[:-1].view(shape).clone()},
        rounded | {"out": wide[1:].view(shape)},
    ):
        given = inputs | {"state": copy_pool(inputs["state"])} | changes
        o = gdn.gated_delta_net_prefill(**given, backend=backend)
        assert o is given["out"]
        assert (o[:, -5:] == 7).all()  # padding
        found.append((o, given["state"]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize(
    "changes", [{"lengths": (0, 0, 0)}, {"lengths": ()}, {"lengths": (0, 0, 0), "tail": 4}]
)
def test_without_tokens_only_fresh_slots_change(
    backend: str, device: str, short: PrefillCase, changes: Any
) -> None:
    inputs = make_prefill(replace(short, **{"tail": 0} | changes), device)
    require(backend, inputs, prefill=True)
    expected = copy_pool(inputs["state"])
    if len(inputs["state_indices"]):
        expected[int(inputs["state_indices"][1])] = 0
    o = gdn.gated_delta_net_prefill(**inputs, backend=backend)
    assert o.shape == inputs["v"].shape
    assert not o.any()
    assert torch.equal(inputs["state"], expected)


@pytest.mark.parametrize("case", [SHORT, STORED, replace(SHORT, out=True)], ids=range(3))
def test_opcheck(backend: str, device: str, dtype: torch.dtype, case: PrefillCase) -> None:
    inputs = make_prefill(replace(case, dtype=dtype, tail=0), device)
    require(backend, inputs, prefill=True)
    prefill = as_prefill(inputs)
    arguments = (*prefill.call, *prefill[1:], backend)
    torch.library.opcheck(torch.ops.gdn.prefill.default, arguments)


@pytest.mark.parametrize("out", [False, True])
def test_compiles_into_one_node(backend: str, device: str, short: PrefillCase, out: bool) -> None:
    inputs = make_prefill(replace(short, out=out, tail=0), device)
    require(backend, inputs, prefill=True)
    again = make_prefill(replace(short, out=out, tail=0), device)

    def run(inputs: dict[str, Any]) -> torch.Tensor:
        return gdn.gated_delta_net_prefill(**inputs, backend=backend) + 1

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), run(again))
    assert torch.equal(inputs["state"], again["state"])
    assert not out or torch.equal(inputs["out"], again["out"])


def test_meta_tensors_give_shapes_alone(short: PrefillCase) -> None:
    inputs = {
        n: x.to("meta") if isinstance(x, torch.Tensor) else x
        for n, x in make_prefill(replace(short, dtype=torch.bfloat16)).items()
    }
    o = gdn.gated_delta_net_prefill(**inputs)
    assert (o.is_meta, o.shape, o.dtype) == (True, inputs["v"].shape, torch.bfloat16)
    assert gdn.explain(**inputs, prefill=True).chosen == "torch"


def test_written_tensors_are_seen_by_autograd(device: str) -> None:
    inputs = make_prefill(replace(STORED, checkpoints="buffer", out=True), device)
    names = ("state", "checkpoints", "out")
    before = [inputs[n]._version for n in names]
    gdn.gated_delta_net_prefill(**inputs)
    assert all(inputs[n]._version > v for n, v in zip(names, before, strict=True))


def test_gradients_are_refused(device: str) -> None:
    inputs = make_prefill(SHORT, device)
    inputs["A_log"].requires_grad_()
    with pytest.raises(RuntimeError, match="prefill is not differentiable, and A_log requires"):
        gdn.gated_delta_net_prefill(**inputs)


def test_explain_says_who_can_prefill() -> None:
    verdicts = {v.name: v for v in gdn.explain(**make_prefill(STORED), prefill=True).verdicts}
    assert not any("pool" in r or "checkpoints" in r for r in verdicts["tilelang"].reasons)
    assert "checkpoints are not supported" in verdicts["fla"].reasons
    assert verdicts["torch"].reasons == ()
    problem = gdn.explain(**make_prefill(STORED), prefill=True).problem
    assert str(problem).endswith("checkpoints prefill on float32 states")


@pytest.mark.gpu
def test_graph_replays_with_other_slots_lengths_and_rows(backend: str, short: PrefillCase) -> None:
    """Padded rows and tokens; other slots, lengths and numbers of live sequences at each replay."""
    case = replace(short, lengths=(70, 3, 64, 0, 0, 0), tail=63)
    inputs = make_prefill(case, "cuda")
    require(backend, inputs, prefill=True)
    if not capabilities_of(backend).cuda_graph or backend == "fla":
        pytest.skip("does not claim CUDA graphs of packed calls")
    gdn.gated_delta_net_prefill(**inputs, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gdn.gated_delta_net_prefill(**inputs, backend=backend)
    for seed, lengths in ((5, (1, 130, 2, 3, 4, 5)), (6, (200, 0, 0, 0, 0, 0)), (7, (0,) * 6)):
        tokens = sum(lengths)
        fresh = make_prefill(replace(case, lengths=lengths, tail=200 - tokens), "cuda", seed=seed)
        for name, x in inputs.items():
            if isinstance(x, torch.Tensor):
                x.copy_(fresh[name])
        graph.replay()
        expected = gdn.gated_delta_net_prefill(**fresh, backend=backend)
        assert torch.equal(o, expected)
        assert torch.equal(inputs["state"], fresh["state"])


PIECES = PrefillCase(
    "pieces", lengths=(330, 0, 200, 70, 64), H=1, HV=2, checkpoints="pool", columns=3, fresh=True,
    tail=70,
)  # fmt: skip


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [PIECES, replace(PIECES, state_v_first=True, out=True)], ids="ab")
def test_where_sequences_are_cut_into_pieces(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    device: str,
    dtype: torch.dtype,
    case: PrefillCase,
) -> None:
    chunking = pytest.importorskip("gdn.backends.common.chunking")
    monkeypatch.setattr(chunking, "MIN_PIECE_CHUNKS", 1)
    monkeypatch.setattr(chunking, "sm_count", lambda device: 10**4)
    case = replace(case, dtype=dtype)
    inputs = make_prefill(case, device, poison=True)
    require(backend, inputs, prefill=True)
    assert_prefill_agrees(backend, case, inputs)
